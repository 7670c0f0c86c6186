"""Upload of a finished run to the model hub (--push_to_hub), by huggingface_hub and its login."""

from __future__ import annotations

import shlex
import sys

from common import InputError


def check_push(repo: str) -> None:
    """Raise InputError, before a training of hours, where its upload could not work: no name of a repository, no hub
    that answers, no token that may write."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if constants.is_offline_mode():
            raise OSError("the hub does not answer, or HF_HUB_OFFLINE is set")
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise OSError("the token may only read")
    except Exception as error:  # of the hub, the connection or the name
        fix = "run `hf auth login` or set HF_TOKEN, to a token that may write; or leave it out and upload later"
        raise InputError(f"--push_to_hub {repo}: {_reason(error)}; {fix}") from None


def push(save_dir: str, repo: str) -> int:
    """Upload a run folder to a repository, which is made private where it is new; return the exit status. Where that
    fails, the run stays as it is, and the command that uploads it is printed."""
    from huggingface_hub import HfApi

    try:
        api, title = HfApi(), "Upload by Distil-SLM"
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=save_dir, commit_message=title)
    except Exception as error:
        again = f"hf upload --private {shlex.quote(repo)} {shlex.quote(save_dir)} ."
        print(f"{save_dir}: complete, but not uploaded ({_reason(error)}); try again: {again}", file=sys.stderr)
        return 1
    print(f"{save_dir}: uploaded to {made}", file=sys.stderr)
    return 0


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
