"""Serve a Grassmann language model over the protocol of OpenAI's client, with Transformers' own server.

    python trainer_scripts/serve.py --device cpu --port 8000

takes what `transformers serve` takes. That looks for a checkpoint's class among Transformers' own classes alone, with
`--trust-remote-code` too, so that the class has to be put there.
"""

import sys

import transformers
from transformers.cli.transformers import main

from modeling_grassmann import GrassmannForCausalLM


if __name__ == "__main__":
    transformers.GrassmannForCausalLM = GrassmannForCausalLM
    sys.argv.insert(1, "serve")
    main()
