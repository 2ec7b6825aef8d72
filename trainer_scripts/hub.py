"""What the scripts say where the Hub refuses."""

from arguments import UserError
from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError


# What a request to the Hub raises; a RuntimeError is that of a large file, and has the reason as its cause.
HUB_ERRORS = (OSError, HFValidationError, RuntimeError)


def check_token(token: str | None) -> None:
    """
    Raises:
        UserError: if there is no access token, here or where `hf auth login` leaves it.
    """
    if not (token or get_token()):
        raise UserError(
            "there is no access token for the Hub: run `hf auth login`, or set HF_TOKEN to a token with write"
            " permission, from https://huggingface.co/settings/tokens"
        )


def explain(error: Exception, repo_id: str) -> UserError:
    """The error that tells the user what to do about a refused request."""
    if isinstance(error, RuntimeError):
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return UserError(f"repo-id {repo_id} is not the name of a repository: {error}")
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return UserError(
            f"the Hub does not accept the access token for {repo_id} (401): run `hf auth login` again, or set HF_TOKEN"
            " to a valid token with write permission"
        )
    if status == 403:
        return UserError(
            f"the access token may not write to {repo_id} (403): use one with write permission for it, or a repository"
            " of your own"
        )
    if isinstance(error, HfHubHTTPError):
        return UserError(f"the Hub failed for {repo_id}: {error}. No file of it was changed; try again")
    return UserError(f"cannot reach the Hub for {repo_id}: {error}. Try again when the connection is back")
