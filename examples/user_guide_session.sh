#!/bin/sh
# A session as in the user guide of SciStream: log in, request both sides, iperf3 through the stream, release.
#
#     examples/user_guide_session.sh [--dev] [PRODUCER_S2CS [CONSUMER_S2CS]]
#
# The services of both facilities run already: for a try, `s2cs --port 5000` and `s2cs --port 6000` on this machine; these
# know their own user, so that --dev leaves the logins out. Needs iperf3. Whatever happens, the stream is released.
set -eu

dev=no
[ "${1:-}" = --dev ] && { dev=yes; shift; }
p2cs=${1:-localhost:5000}
c2cs=${2:-localhost:6000}
port=${IPERF3_PORT:-5201}
uid=
server=

finish() {
    status=$?
    [ -z "$uid" ] || s2uc release "$uid"
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

# 1. Log in at Globus for each facility. The token is kept for you alone and goes to that facility only.
if [ "$dev" = no ]; then
    s2uc login --s2cs "$p2cs"
    s2uc login --s2cs "$c2cs"
    s2uc check-auth
fi

# 2. The application that listens, at the producer's site.
iperf3 --server --port "$port" >/dev/null &
server=$!

# 3. The producer's side: a relay that leads to the application.
inbound=$(s2uc inbound-request --remote_ip 127.0.0.1 --receiver_ports "$port" --num_conn 1 --s2cs "$p2cs")
uid=$(printf '%s\n' "$inbound" | awk 'NR == 2 { print $1 }')
prod_lstn=$(printf '%s\n' "$inbound" | sed -n 's/^listeners: "\(.*\)"$/\1/p')
echo "stream $uid, the producer's relay listens at $prod_lstn"

# 4. The consumer's side: a relay that leads to the producer's. --wait-s waits until a probe has gone all the way.
outbound=$(s2uc outbound-request "$uid" "$prod_lstn" --num_conn 1 --s2cs "$c2cs" --wait-s 30)
listener=$(printf '%s\n' "$outbound" | sed -n 's/^listeners: "\(.*\)"$/\1/p')
echo "the consumer connects to $listener"

# 5. The application that connects, at the consumer's site. It knows nothing of the relays.
iperf3 --client "${listener%:*}" --port "${listener##*:}" --time "${IPERF3_SECONDS:-3}"
s2uc status "$uid"
