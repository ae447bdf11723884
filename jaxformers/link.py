"""`jaxformers.link`: record linkage for pandas users. The functions are those of `jaxformers.tasks.linktransformer`."""

from jaxformers.tasks.linktransformer import *  # noqa: F403
from jaxformers.tasks.linktransformer import __all__  # noqa: F401
