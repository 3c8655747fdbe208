"""What is remembered of requests: metrics, structured logs, drift, and every decision.

The `Fanout` tells all of them what happens, so that none of them can hurt a request.
"""
