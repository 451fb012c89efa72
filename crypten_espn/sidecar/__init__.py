"""HTTP for applications beside the client: inputs leave the host only masked.

It speaks the Open Inference Protocol v2, so that an application changes one URL, and
has one page for people.

Source: https://github.com/kserve/open-inference-protocol, and Triton's extensions
"binary tensor data" and "classification".
"""
