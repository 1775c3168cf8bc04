"""Put a trained model on a hub of models.

    python -m openrlhf_apo.cli.push runs/tiny_seed1 OWNER/NAME [--private]

Uploads what makes a model of the folder (weights, configuration, tokenizer, card) and nothing else of the run. The
token is that of `hf auth login` or HF_TOKEN, the hub is huggingface.co or HF_ENDPOINT's.
"""

import sys
from pathlib import Path

from openrlhf_apo.cli.console import Parser, exit_code

OF_THE_RUN = ("run.json", "compare.json", "samples.jsonl")  # beside the model, in the same folder
PARTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m openrlhf_apo.cli.push", description="Put a trained model on a hub of models.")
    parser.add_argument("model", metavar="MODEL", type=Path, help="output directory of a run, or another model folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="of the model on the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="a new one is seen by its owner alone")
    args = parser.parse_args(argv)
    files = model_files(args.model)
    if not {"config.json", "adapter_config.json"} & set(files):
        parser.error(f"{args.model} holds no model: give the output directory of a run that has ended")
    from httpx import HTTPError  # with the hub's library, which takes a second to import
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(args.name, private=args.private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=args.name,
            folder_path=args.model,
            allow_patterns=files,
            commit_message="Upload a model trained with openrlhf_apo",
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        print(f"error: {args.name} is not uploaded: {reason}", file=sys.stderr)
        return 1
    print(f"uploaded {len(files)} files: {commit.commit_url}")
    return 0


def model_files(folder: Path) -> list[str]:
    """The names of the files in a run's output directory that make up its model."""
    found = {path.name for part in PARTS for path in folder.glob(part) if path.is_file()}
    return sorted(found - set(OF_THE_RUN))


if __name__ == "__main__":
    sys.exit(exit_code(main))
