"""Upload of a finished run to the model hub (--push_to_hub), by huggingface_hub and its login."""

from __future__ import annotations

import shlex
import sys

from common import InputError


def create_repository(repo: str) -> str:
    """Create a repository of the hub, a private one, if it is not there; return its full name. This is done before a
    training of hours, since it fails where an upload would. Raises InputError."""
    from huggingface_hub import HfApi

    try:
        return HfApi().create_repo(repo, private=True, exist_ok=True).repo_id
    except Exception as error:  # of the hub, the connection or the name
        fix = "run `hf auth login` or set HF_TOKEN, to a token that may write; or leave it out and upload later"
        raise InputError(f"--push_to_hub {repo}: {_reason(error)}; {fix}") from None


def push(save_dir: str, repo: str) -> int:
    """Upload a run folder to a repository; return the exit status. Where that fails, the run stays as it is, and the
    command that uploads it is printed."""
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=repo, folder_path=save_dir, commit_message="Upload by Distil-SLM")
    except Exception as error:
        again = f"hf upload --private {shlex.quote(repo)} {shlex.quote(save_dir)} ."
        print(f"{save_dir}: complete, but not uploaded ({_reason(error)}); try again: {again}", file=sys.stderr)
        return 1
    print(f"{save_dir}: uploaded to {repo}", file=sys.stderr)
    return 0


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
