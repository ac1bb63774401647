#!/bin/bash
# Runs a command twice at once, on two nodes: network namespaces of their own, with a cable between them. The command
# finds in its environment NODE (0 or 1), ADDRESS (its own) and FIRST (node 0's). Needs util-linux and iproute2:
#
#   unshare --map-root-user --net bash two_nodes.sh COMMAND...
set -eu
holders=()
trap 'kill "${holders[@]}" 2>/dev/null' EXIT
for node in 0 1; do
    unshare --net sleep infinity &
    holders+=($!)
done
for holder in "${holders[@]}"; do # it begins in our network, and leaves it
    until [ "$(readlink "/proc/$holder/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
done
ip link add cable0 netns "${holders[0]}" type veth peer name cable1 netns "${holders[1]}"
jobs=()
for node in 0 1; do
    inside=(nsenter --target "${holders[node]}" --net)
    "${inside[@]}" ip address add "10.7.0.$((node + 1))/24" dev "cable$node"
    "${inside[@]}" ip link set "cable$node" up
    "${inside[@]}" ip link set lo up
    NODE=$node ADDRESS=10.7.0.$((node + 1)) FIRST=10.7.0.1 GLOO_SOCKET_IFNAME=cable$node "${inside[@]}" "$@" &
    jobs+=($!)
done
code=0
for job in "${jobs[@]}"; do wait "$job" || code=$?; done
exit "$code"
