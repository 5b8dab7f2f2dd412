"""A question answered on one device from frame to masks: the host enqueues work and waits at most three times.

arrays.py   rows of device arrays, and page-locked memory through which small arrays go up
kernels.py  the operations of `segzero_rt.kernels` as a stream takes them
cache.py    the decoder's memory, its flavours' inputs advanced without the host
reply.py    the decode loop: token t + 1 is enqueued before token t is known
policy.py   look and ask
"""
