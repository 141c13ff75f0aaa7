"""The control plane of llep: HTTP, metrics and what people see."""
