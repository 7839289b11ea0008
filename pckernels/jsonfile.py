"""What a command printed, as a JSON file."""

import argparse
import json
from pathlib import Path
from typing import Any


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=output_path, metavar="FILE", help="write what was printed to FILE, as JSON")


def output_path(text: str) -> Path:
    """A path that can be written to; its folder is made. For argparse, so that a mistake is seen before the work is done."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder that can be made ({error.strerror}).") from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it.")
    return path


def write_json(path: Path, content: Any) -> None:
    """Write plain data; numbers that are not finite become strings, as JSON has none."""
    path.write_text(json.dumps(_plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if isinstance(content, float) and content - content != 0:
        return str(content)
    return content
