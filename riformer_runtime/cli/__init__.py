"""The verbs that need no PyTorch: predict, check and serve. rich draws what they print."""

from riformer_runtime.cli.check import check_verb
from riformer_runtime.cli.options import run as run
from riformer_runtime.cli.predict import predict_verb
from riformer_runtime.cli.serve import serve_verb

VERBS = {"predict": predict_verb, "check": check_verb, "serve": serve_verb}
