"""The one exception type for what a user can put right."""


class AptError(Exception):
    """Bad input or an unsupported set-up; the message is one line that names the thing, the rule and the way out."""
