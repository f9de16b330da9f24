"""`ovsam label-studio`: a machine-learning backend for Label Studio."""

from argparse import ArgumentParser, Namespace

from ovsam_cli import arguments

PARSER = {
    "description": "Serve a machine-learning backend for Label Studio, which predicts the labels of a project's\n"
    "labelling interface (see docs/labels.md). Add its address under Settings > Model of the project.",
    "epilog": """\
  ovsam label-studio --model photo --port 9090

The environment variables LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY give the address and the API key of Label Studio,
for images that were uploaded to it.
""",
}


def add_arguments(parser: ArgumentParser) -> None:
    arguments.add(parser, "--model", "--device", "--threshold")
    arguments.add_address(parser, port=9090)


def check(args: Namespace) -> None:
    """Raise InputError for an invalid port."""
    arguments.check_port(args.port)


def run(args: Namespace) -> int:
    """Serve until interrupted."""
    import ovsam
    from ovsam.inference.serving.label_studio import make_backend_server

    segmenter = ovsam.load(args.model, device=args.device)
    with make_backend_server(segmenter, args.host, args.port, args.threshold) as server:
        print(f"Label Studio's backend with the model {segmenter.name}: http://{args.host}:{args.port}", flush=True)
        server.serve_forever()
    return 0
