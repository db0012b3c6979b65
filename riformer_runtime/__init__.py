"""Runs what `riformer export` writes: images in, class names out. NumPy and Pillow are all that it imports.

runner = riformer_runtime.open_runner("exported")  # on the fastest engine that is installed
for prediction in riformer_runtime.predict(runner, ["cat.jpg"]):
print(prediction.classes)
"""

from riformer_runtime.artifact import Artifact, Manifest, Payload
from riformer_runtime.engines import Runner, open_runner
from riformer_runtime.predict import Prediction, predict
from riformer_runtime.version import __version__

__all__ = ["Artifact", "Manifest", "Payload", "Prediction", "Runner", "__version__", "open_runner", "predict"]
