"""A federation across real hospitals: keys, certificates, kits, and the processes of server and site over TLS.

`consortium.toml` and `site.toml` describe the two sides. Flower's SuperLink and SuperNode do the talking; what is here
makes what they need, starts and ends them, and runs at a site nothing but the fedmed that is installed there.
"""
