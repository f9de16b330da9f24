"""`ovsam push`: publish a model or an adapter on the Hugging Face Hub."""

from argparse import ArgumentParser, Namespace

PARSER = {
    "description": "Load the folder back in a clean process, compare its outputs, and only "
    "then upload it (see docs/publishing.md)."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="what save_pretrained or `ovsam train` wrote")
    parser.add_argument("repo", metavar="ORG/NAME", help="the repository; made if there is none")
    parser.add_argument("--private", action="store_true", help="only for those who have access to the repository")
    parser.add_argument("--revision", metavar="REV", help="a branch; made if there is none")
    parser.add_argument("--create-pr", action="store_true", help="as a pull request")
    parser.add_argument("--dry-run", action="store_true", help="say what would be sent, and send nothing")


def run(args: Namespace) -> int:
    """Publish a folder and print its address."""
    from transformers.utils import logging

    from ovsam.checkpoints.push import push as push_folder

    logging.disable_progress_bar()
    address = push_folder(
        args.folder,
        args.repo,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        dry_run=args.dry_run,
    )
    if address:
        print(address)
    return 0
