"""Servers by URL that speak OpenAI's protocol: each is one replica.

`ServerBackend` (`backend`) has an `exchange` for each job, which reads the `sse` of its `answer`; a
`breaker` and a `probe` judge the server's health, `scrape` reads its metrics, `prompt_length`
learns how many tokens prompts have there, and `merge` puts streamed choices together.
"""
