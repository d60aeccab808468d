"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A mistake in something the user gave: a flag, a config, a file, a checkpoint, a prompt.

    The message is one sentence naming the value, the rule it breaks and the way out.
    `gpt2_jax.cli.run` prints it on one line and exits with status 2; library users catch it.
    """
