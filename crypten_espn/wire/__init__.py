"""The wire between parties: one connection, ring elements at their true width.

In order of reading: `packing` puts elements of a ring into bytes, `frames` says what a
message looks like, `stream` moves bytes within deadlines, `channel` carries messages,
`tls` checks roles, `connect` makes channels, `crypten` runs CrypTen's protocols over
one.
"""
