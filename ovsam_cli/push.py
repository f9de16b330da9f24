"""`ovsam push`: publish a model or an adapter on the Hugging Face Hub."""

import os
from argparse import ArgumentParser, Namespace

from ovsam.checkpoints.download import check_repository
from ovsam.errors import InputError

PARSER = {
    "description": "Load the folder back in a clean process, compare its outputs, "
    "then upload it (see docs/publishing.md)."
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder written by save_pretrained or `ovsam train`")
    parser.add_argument("repo", metavar="ORG/NAME", help="repository, created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="REV", help="branch, created if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--dry-run", action="store_true", help="print the upload without sending it")


def check(args: Namespace) -> None:
    """Raise InputError for a folder without a model, and a name that no repository can have."""
    if not os.path.isfile(os.path.join(args.folder, "config.json")):
        raise InputError(f"{args.folder} has no config.json; pass the folder of a model.")
    check_repository(args.repo, args.revision, args.create_pr)


def run(args: Namespace) -> int:
    """Publish a folder and print its address."""
    from ovsam.checkpoints.push import push as push_folder

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
