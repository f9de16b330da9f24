from ovsam import OVSamConfig, OVSamModel, OVSamProcessor  # noqa: F401
