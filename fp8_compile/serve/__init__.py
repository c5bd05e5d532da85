"""An image server that speaks OpenAI's Images API; ``docs/serving.md`` is its guide.

`engine` draws, and knows nothing of HTTP. `protocol` is what requests and responses look like. `admission` turns a
request into an order for the engine, or refuses it. `app` is the two together.
"""
