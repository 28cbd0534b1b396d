"""A federation across real hospitals: keys, certificates, kits, and the processes of server and site over TLS.

`consortium.toml` and `site.toml` describe the two sides. Flower's SuperLink and SuperNode do the talking; what is here
makes what they need, starts and ends them, and runs at a site nothing but the fedmed that is installed there.

* Keys and papers: `node_keys` of sites, `certificates` of server and `coordinators`; a site's `cards` go to its
  coordinator and `kits` come back; `provision` makes all that a server starts with.
* Folders: `consortium` of the server, `site_folder` of a hospital, and where its `records` lie; `files` that only their
  owner reads, `scratch` of tasks.
* The server: `superlink`, `guarded` against other machines, with `proxy` in front; `continuing` what it lost.
* Its coordinator: `control` of sites and runs, `submission` of a run file with the `flower_app`, `following` of its
  events, `run_files` to fetch.
* A site: `supernode` keeps Flower's running, as a `node` on the server's time, whose `node_state` leaves no message
  without an answer; `door` stands where Flower starts its own program, `warm` forks each `task`, `confinement` holds
  it; `health` for the hospital's monitoring.
* Before it joins: `checks` of everything, `reach` of the server, `dry_round` on ten patients.
* Beside it: `processes` that are watched and ended, Flower's `launcher` among them.
"""
