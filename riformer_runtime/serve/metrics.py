"""What the server counts and measures, in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and histograms of one server; see their descriptions.

    Attributes:
        registry: of all of them, and of the process's memory and processor time.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "riformer_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.request_seconds = self._histogram("request_seconds", "From a request to its answer.", "route", SECONDS)
        self.in_work = Gauge("riformer_requests_in_work", "Accepted and not answered yet.", registry=self.registry)
        self.images = Counter("riformer_images", "Images by result.", ["model", "result"], registry=self.registry)
        self.batch_images = self._histogram("batch_images", "Images in a batch.", "model", IMAGES)
        self.wait_seconds = self._histogram("wait_seconds", "From a read image to its batch.", "model", SECONDS)
        self.compute_seconds = self._histogram("compute_seconds", "The network, of a batch.", "model", SECONDS)

    def _histogram(self, name: str, text: str, label: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"riformer_{name}", text, [label], buckets=buckets, registry=self.registry)
