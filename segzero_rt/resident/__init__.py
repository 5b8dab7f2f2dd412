"""A question answered on one device from frame to masks: the host enqueues work and waits at most three times.

arrays.py   rows of device arrays, and page-locked memory through which small arrays go up
cache.py    the decoder's memory, its flavours' inputs advanced without the host
reply.py    the decode loop: token t + 1 is enqueued before token t is known
policy.py   look and ask
segmenter.py, reading.py, frames.py   features and masks; tokens to prompts; pictures from the host or another library
dlpack.py   arrays from and to other libraries
pipeline.py   all of it together
"""
