"""Predictions over HTTP. FastAPI, uvicorn and the Prometheus client come with the extra "serve"."""
