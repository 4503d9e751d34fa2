"""A running store for those who watch it: Prometheus metrics, a server for them, spans for OpenTelemetry (docs/metrics.md)."""
