"""The wire between parties: one connection, ring elements at their true width.

`packing` puts elements of a ring into bytes, `channel` carries messages, `connect`
makes channels, `tls` protects them, `crypten` runs CrypTen's protocols over one.
"""
