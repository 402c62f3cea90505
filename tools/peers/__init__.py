"""Other codecs of key-value caches, measured by the code that measures kvcodec.

    make peers

makes the table, the pictures and the document of docs/peers.md. A peer is either the installed
package, called as its authors call it, or a re-implementation of published numerics in our own
words, which every table marks with a dagger. `peers.registry` lists them, and what cannot run here.
"""
