#!/bin/bash
# Runs as root inside the fresh Debian tree (a chroot with /proc, /dev and /sys): installs the kernel, the storage tools,
# ZFS's modules and the interpreters that the tests use, then throws away what only the build needed.
# $REQUIREMENTS: what the checkout's setup.cfg asks of PyPI. Nothing here names a registry: apt and pip have their own.
set -euxo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
APT="apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0"

# No service starts in a build, nothing is synced to a disk that is thrown away if the build dies, no manuals.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
echo force-unsafe-io >/etc/dpkg/dpkg.cfg.d/lab
printf 'path-exclude=%s\n' '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/locale/*' >>/etc/dpkg/dpkg.cfg.d/lab
mkdir -p /etc/postgresql-common
echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf

sed -i -E '/^deb /s/ main.*/ main contrib/' /etc/apt/sources.list
apt-get -q update
$APT install linux-image-cloud-amd64 linux-headers-cloud-amd64 dkms \
    udev kmod util-linux util-linux-extra procps psmisc mount acl attr quota git ca-certificates iproute2 less systemd systemd-container dbus cron \
    lvm2 thin-provisioning-tools dmsetup cryptsetup-bin mdadm btrfs-progs xfsprogs e2fsprogs \
    python3 python3-venv python3-cffi python3-dbus libmagic1 postgresql postgresql-contrib
KERNEL=$(basename /lib/modules/*)

# ZFS: Debian ships it as source. The modules are kept aside, so that the compiler and the headers can go.
$APT install zfs-dkms
[ -n "$(find "/lib/modules/$KERNEL" -name 'zfs.ko*')" ] || dkms autoinstall -k "$KERNEL"
mkdir -p /tmp/modules
find "/lib/modules/$KERNEL/updates" -name '*.ko*' -exec cp {} /tmp/modules/ \;
ls /tmp/modules/zfs.ko* >/dev/null
$APT install zfsutils-linux python3-pyzfs zfs-auto-snapshot sanoid

# The tests' interpreter has no libzfs_core of its own: a test chooses a build of it by PYTHONPATH, or none.
python3 -m venv /opt/venv
PIP="/opt/venv/bin/pip install -q --no-cache-dir --disable-pip-version-check"
read -ra wanted <<<"$REQUIREMENTS"
$PIP "${wanted[@]}" cffi
mkdir -p /opt/libzfs_core/openzfs
ln -s /usr/lib/python3/dist-packages/libzfs_core /opt/libzfs_core/openzfs/libzfs_core
$PIP --no-deps --target /opt/libzfs_core/pypi pyzfs==0.2.3
# Peers that the bench runs beside us; snapm takes Debian's python3-dbus, which pip could only compile,
# and libmagic.
for peer in snapm zfs-autobackup; do
    python3 -m venv --system-site-packages "/opt/peers/$peer"
    "/opt/peers/$peer/bin/pip" install -q --no-cache-dir --disable-pip-version-check "$peer"
done
# The checkout is put there at boot; found by import from any directory, as an installed package is.
echo /checkout >/opt/venv/lib/python3.11/site-packages/checkout.pth
printf '#!/opt/venv/bin/python\nimport sys\nfrom snapshotter.__main__ import main\nsys.exit(main())\n' >/opt/venv/bin/snapshotter
chmod 755 /opt/venv/bin/snapshotter

# What only the build needed.
apt-get -q -y purge zfs-dkms dkms 'linux-headers-*' 'linux-kbuild-*' >/dev/null
apt-get -q -y autoremove --purge >/dev/null
mkdir -p "/lib/modules/$KERNEL/updates/dkms"
cp /tmp/modules/* "/lib/modules/$KERNEL/updates/dkms/"
depmod "$KERNEL"
apt-get clean
rm -rf /var/lib/apt/lists/* /usr/sbin/policy-rc.d /tmp/modules /usr/share/doc /usr/share/man /boot/initrd* /var/lib/dkms
# They still start, without what was thrown away.
/opt/peers/snapm/bin/snapm --version
said=$(/opt/peers/zfs-autobackup/bin/zfs-autobackup --version || true) # it exits 255
[[ $said == zfs-autobackup* ]]

# Daemons and scans that would act by themselves on the tests' storage: no automatic activation, no import, no assembly.
rm -f /lib/udev/rules.d/*zvol-persist* /etc/cron.*/* /etc/cron.d/*
sed -i -E 's/^(\s*)#?\s*(event_activation|monitoring)\s*=.*/\1\2 = 0/' /etc/lvm/lvm.conf
echo lab >/etc/hostname
echo '127.0.0.1 localhost lab' >/etc/hosts
python3 -m compileall -q /usr/lib/python3 /opt >/dev/null || true
