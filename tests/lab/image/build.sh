#!/bin/bash
# Builds the lab's image: $WORK/root.img and $WORK/vmlinuz. Runs as root in a mount and process namespace of its own,
# so that its mounts and processes vanish with it. Given by scripts/lab.py: WORK, SUITE, DEBOOTSTRAP, MKE2FS, SIZE (MiB),
# RECIPE, REQUIREMENTS. Where packages come from is this machine's own business: apt's mirror, proxy and certificates
# as they are set here, else debootstrap's and pip's defaults.
set -euxo pipefail
mount --make-rprivate /
root=$WORK/root
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' "Codename: $SUITE" 2>/dev/null | head -n 1) || true
"$DEBOOTSTRAP" --variant=minbase --include=ca-certificates "$SUITE" "$root" ${mirror:+"$mirror"}

for place in proc sys dev; do
    mount --rbind "/$place" "$root/$place"
done
mount -t tmpfs run "$root/run"
cp "$RECIPE/inside.sh" "$root/run/"
cp --remove-destination /etc/resolv.conf "$root/etc/resolv.conf"
{ apt-config dump | grep -E '^Acquire::(https?::|Check-)' || true; } >"$root/etc/apt/apt.conf.d/00host"
if [ -f /etc/ssl/certs/ca-certificates.crt ]; then
    cp /etc/ssl/certs/ca-certificates.crt "$root/run/ca.crt"
    export PIP_CERT=/run/ca.crt SSL_CERT_FILE=/run/ca.crt
    echo 'Acquire::https::CAInfo "/run/ca.crt";' >>"$root/etc/apt/apt.conf.d/00host"
fi
# A directory of wheels on this machine is not there inside; an index by its address is.
unset PIP_FIND_LINKS
chroot "$root" /bin/bash /run/inside.sh

rm -f "$root/etc/apt/apt.conf.d/00host" "$root/etc/resolv.conf"
umount -R "$root/run" "$root/dev" "$root/sys" "$root/proc"
mkdir -p "$root/checkout" "$root/results"
install -m 755 "$RECIPE/init" "$root/lab-init"
cp "$root"/boot/vmlinuz-* "$WORK/vmlinuz"
rm -rf "$root"/boot/*
"$MKE2FS" -q -t ext4 -O ^has_journal -m 0 -E root_owner=0:0,lazy_itable_init=1 -d "$root" "$WORK/root.img.part" "${SIZE}M"
chmod 644 "$WORK/vmlinuz" "$WORK/root.img.part"
mv "$WORK/root.img.part" "$WORK/root.img"
