from ovsam import *  # noqa: F403
