"""An exported model behind Ray Serve: two replicas, each with the model opened once, and Ray's own balancing.

    pip install 'riformer' 'ray[serve]'
    riformer export runs/photos-seed0 exported/
    python examples/ray_serve.py exported/ cat.jpg dog.jpg

Prints the answers of the replicas, and which replica gave each. On a cluster, `serve run` takes `application` below.
"""

import argparse
import io
import os
from pathlib import Path
from typing import Any

from ray import serve

from riformer_runtime import open_runner, predict


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.5})
class Classifier:
    """A replica."""

    def __init__(self, artifact: str):
        self.runner = open_runner(artifact, threads=1)

    def __call__(self, content: bytes) -> dict[str, Any]:
        """The most probable classes of an image file."""
        (prediction,) = predict(self.runner, [io.BytesIO(content)])
        return {"classes": prediction.classes, "error": prediction.error, "replica": os.getpid()}


def application(artifact: str) -> serve.Application:
    """What Ray Serve runs."""
    return Classifier.bind(str(Path(artifact).resolve()))


def main() -> None:
    """Starts the replicas on this machine and sends them images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="what riformer export wrote")
    parser.add_argument("images", nargs="+", help="image files")
    options = parser.parse_args()
    handle = serve.run(application(options.artifact))
    responses = [handle.remote(Path(image).read_bytes()) for image in options.images]
    for image, response in zip(options.images, responses, strict=True):
        answer = response.result()
        classes = ", ".join(f"{name} {share:.1%}" for name, share in answer["classes"])
        print(f"{image}: {classes or answer['error']} (replica {answer['replica']})")
    serve.shutdown()


if __name__ == "__main__":
    main()
