"""An image server that speaks OpenAI's Images API; ``docs/serving.md`` is its guide.

`orders` is what is asked for and what comes of it. `engine` queues that, and knows nothing of HTTP; `painter` draws, in
`painter_process` where a death shall not end the server. `protocol` is what requests and responses look like.
`admission` turns a request into an order, or refuses it. `app` is all that together.
"""
