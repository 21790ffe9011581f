"""A server of images: OpenAI's and AUTOMATIC1111's APIs, a queue, and a page for browsers."""
