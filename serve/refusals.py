"""How a request is refused."""


class RefusedError(Exception):
    """A request is refused with a status, a reason code and a sentence."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.retry_after_s = (
            status,
            reason,
            message,
            retry_after_s,
        )
