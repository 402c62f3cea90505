#!/usr/bin/env bash
# Ceph's S3 server from the distribution, with the two daemons it cannot do without: of what can be
# installed as a package it is the one real server that honours conditional writes.
set -euo pipefail
hash radosgw ceph-mon ceph-osd 2>/dev/null || ../apt_install.sh radosgw ceph-mon ceph-osd
