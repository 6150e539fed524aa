#!/usr/bin/env bash
# Announces this node to Ray once the cloud says that it takes the machine away: a run then commits
# and goes on without it. On machines that are not spot it waits for ever.
#   spot-notice.sh aws|gcp RAY_ADDRESS [METADATA_URL [SECONDS_BETWEEN_LOOKS]]
set -euo pipefail
cloud=$1 ray=$2 pause=${4:-5}
# One a machine, however often Ray is started anew.
exec 9>"${TMPDIR:-/tmp}/clip-ray-spot-$UID.lock"
flock -n 9 || exit 0

case $cloud in
aws)
    url=${3:-http://169.254.169.254}
    notice_s=100 # of 120
    announced() {
        # Version 2 of the metadata service: a token first. No notice is a 404.
        local token
        token=$(curl -sf -m 5 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
            "$url/latest/api/token") &&
            curl -sf -m 5 -o /dev/null -H "X-aws-ec2-metadata-token: $token" \
                "$url/latest/meta-data/spot/instance-action"
    }
    ;;
gcp)
    url=${3:-http://metadata.google.internal}
    notice_s=25 # of 30
    announced() {
        [ "$(curl -sf -m 5 -H 'Metadata-Flavor: Google' \
            "$url/computeMetadata/v1/instance/preempted")" = TRUE ]
    }
    ;;
*)
    echo "spot-notice.sh: $cloud is neither aws nor gcp" >&2
    exit 2
    ;;
esac

until announced; do
    sleep "$pause"
done
echo "$(date -Is) the machine is taken away: announced to Ray"
# Without --node-id it is this node.
exec ray drain-node --address "$ray" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "the cloud takes the spot machine away" --deadline-remaining-seconds "$notice_s"
