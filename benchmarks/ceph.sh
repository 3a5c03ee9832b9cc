#!/usr/bin/env bash
# A throwaway S3 server to measure and to test against: one Ceph with its RADOS gateway, on loopback, without systemd.
#
#   benchmarks/ceph.sh install        install Debian's packages (as root); their services are kept from starting
#   benchmarks/ceph.sh start [DIR]    print "READY seconds DIR/env.sh"; `source` that file to point AWS clients there
#   benchmarks/ceph.sh stop  [DIR]    end it, by its process ids, and remove DIR
#
# Needs root. Everything lies in DIR (.ceph). With STORE=memstore data lie in memory, at most OSD_GB of them.
# It checks signatures and conditional PUTs, and ignores If-None-Match when a multipart upload is completed.
# Settings: STORE=memstore|bluestore  RGW_PORT=7480  MON_PORT=13300  OSD_GB=8  RGW_THREADS=128
set -euo pipefail
CMD=${1:-}; DIR=${2:-$PWD/.ceph}
STORE=${STORE:-memstore}; RGW_PORT=${RGW_PORT:-7480}; MON_PORT=${MON_PORT:-13300}
OSD_GB=${OSD_GB:-8}; RGW_THREADS=${RGW_THREADS:-128}
ACCESS=${ACCESS:-testkey}; SECRET=${SECRET:-testsecret}
export CEPH_CONF=$DIR/ceph.conf

install() {
  command -v radosgw >/dev/null && command -v ceph-osd >/dev/null && return 0
  # With RUNLEVEL=1, the packages' scripts start no service.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      ceph-mon ceph-osd ceph-mgr radosgw ceph-common curl
}
wait_for() { # wait_for <tries*0.1s> cmd...
  local n=$1; shift
  for _ in $(seq "$n"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
  echo "timeout waiting for: $*" >&2; return 1
}
start() {
  local t0 t1; t0=$(date +%s.%N)
  [ -e "$DIR" ] && { echo "$DIR exists; run stop first" >&2; exit 1; }
  mkdir -p "$DIR"/{mon,osd,mgr,log,run,rgw}; chmod 700 "$DIR"
  local fsid osdid; fsid=$(cat /proc/sys/kernel/random/uuid); osdid=$(cat /proc/sys/kernel/random/uuid)
  cat >"$DIR/ceph.conf" <<C
[global]
fsid = $fsid
mon_host = [v2:127.0.0.1:$MON_PORT]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_ipv6 = false
ms_bind_msgr1 = false
ms_bind_msgr2 = true
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = $DIR/keyring
run_dir = $DIR/run
admin_socket = $DIR/run/\$cluster-\$name.asok
pid_file = $DIR/run/\$name.pid
log_file = $DIR/log/\$name.log
mon_cluster_log_file = $DIR/log/cluster.log
crash_dir = $DIR/log
setuser_match_path =
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_warn = 1
mon_data_avail_crit = 0
mon_osd_full_ratio = 0.99
mon_osd_nearfull_ratio = 0.98
mon_osd_backfillfull_ratio = 0.985
osd_crush_chooseleaf_type = 0
osd_objectstore = $STORE
memstore_device_bytes = ${OSD_GB}G
bluestore_block_create = true
bluestore_block_size = $((OSD_GB<<30))
bluestore_fsck_on_mount = false
osd_memory_target = 1073741824
osd_max_object_name_len = 256
osd_max_object_namespace_len = 64
debug_ms = 0
debug_osd = 0
debug_mon = 0
debug_rgw = 0
debug_bluestore = 0
debug_rocksdb = 0
[mon.a]
mon_data = $DIR/mon/a
[osd.0]
osd_data = $DIR/osd/0
[mgr.x]
mgr_data = $DIR/mgr/x
mgr_initial_modules =
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:$RGW_PORT
rgw_thread_pool_size = $RGW_THREADS
rgw_data = $DIR/rgw
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_dns_name = localhost
rgw_crypt_require_ssl = false
rgw_lifecycle_work_time = 00:00-24:00
rgw_lc_debug_interval = ${LC_DEBUG:-0}
rgw_gc_obj_min_wait = 5
rgw_gc_processor_period = 5
rgw_relaxed_s3_bucket_names = true
C
  ceph-authtool --create-keyring "$DIR/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  ceph-authtool "$DIR/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' --cap mds 'allow *' >/dev/null
  ceph-authtool "$DIR/keyring" --gen-key -n mgr.x --cap mon 'allow profile mgr' --cap osd 'allow *' --cap mds 'allow *' >/dev/null
  ceph-authtool "$DIR/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *' >/dev/null
  ceph-authtool "$DIR/keyring" --gen-key -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx' --cap mgr 'allow rw' >/dev/null
  monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$MON_PORT]" "$DIR/monmap" >/dev/null
  mkdir -p "$DIR/mon/a"; ceph-mon -i a --mkfs --monmap "$DIR/monmap" --keyring "$DIR/keyring" >>"$DIR/log/boot.log" 2>&1
  ceph-mon -i a >>"$DIR/log/boot.log" 2>&1
  wait_for 200 ceph -s --connect-timeout 2
  mkdir -p "$DIR/mgr/x"; ceph-mgr -i x >>"$DIR/log/boot.log" 2>&1
  ceph osd new "$osdid" >/dev/null 2>>"$DIR/log/boot.log"
  mkdir -p "$DIR/osd/0"; ceph-osd -i 0 --mkfs --osd-uuid "$osdid" >>"$DIR/log/boot.log" 2>&1
  ceph-osd -i 0 >>"$DIR/log/boot.log" 2>&1
  wait_for 200 sh -c 'ceph osd stat | grep -q "1 up"'
  radosgw -n client.rgw --rgw-frontends "beast endpoint=127.0.0.1:$RGW_PORT" >>"$DIR/log/boot.log" 2>&1
  wait_for 600 curl -fs -o /dev/null "http://127.0.0.1:$RGW_PORT/"
  radosgw-admin -n client.rgw user create --uid=test --display-name=test --max-buckets=0 --access-key="$ACCESS" --secret="$SECRET" \
      >"$DIR/user.json" 2>>"$DIR/log/boot.log"
  cat >"$DIR/env.sh" <<C
export AWS_ACCESS_KEY_ID=$ACCESS AWS_SECRET_ACCESS_KEY=$SECRET AWS_DEFAULT_REGION=us-east-1 AWS_REGION=us-east-1
export AWS_ENDPOINT_URL=http://127.0.0.1:$RGW_PORT AWS_EC2_METADATA_DISABLED=true
C
  t1=$(date +%s.%N); echo "READY $(echo "$t1 - $t0" | awk '{print $1-$3}') $DIR/env.sh"
}
stop() {
  local f p
  for f in "$DIR"/run/client.rgw.pid "$DIR"/run/osd.0.pid "$DIR"/run/mgr.x.pid "$DIR"/run/mon.a.pid; do
    [ -s "$f" ] || continue; p=$(cat "$f"); kill "$p" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "$p" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$p" 2>/dev/null || true
  done
  rm -rf "$DIR"
}
case $CMD in install) install;; start) install; start;; stop) stop;; *) sed -n 2,10p "$0"; exit 2;; esac
