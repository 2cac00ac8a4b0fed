#!/bin/bash
# The guest's side of the lab: PID 1 after the image's init. Brings up udev and the modules, runs the job on the virtio
# console, writes /results to the third NVMe namespace, powers off. Knows nothing of what the job tests.
set -u
mkdir -p /dev/pts /dev/shm /results
mount -t devpts -o mode=620,gid=5 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=1777,size=2G tmp /tmp
mount -t tmpfs results /results
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t configfs configfs /sys/kernel/config 2>/dev/null
mkdir -p /run/lock /run/user /run/udev
hostname lab
ip link set lo up
ulimit -n 65536
/lib/systemd/systemd-udevd --daemon
modprobe -a virtio_pci virtio_console loop dm-mod dm-snapshot dm-thin-pool zfs
udevadm trigger --subsystem-match=block --subsystem-match=misc
udevadm settle --timeout=60
for _ in {1..100}; do
    [ -c /dev/hvc0 ] && break
    sleep 0.1
done

export SNAPSHOTTER_IN_LAB=1 LAB_RESULTS=/results TERM=${TERM:-linux} PYTHONUNBUFFERED=1
export PATH=/opt/venv/bin:$PATH
read -r LIMIT DISKS </checkout/.lab/limits
until [ -b "/dev/nvme0n$((DISKS + 3))" ]; do sleep 0.1; done
LAB_DISKS=$(printf '/dev/%s ' $(cd /sys/block && ls -d nvme0n* | sort -V | tail -n +4))
export LAB_DISKS
cd /checkout
# The tests' commands don't write byte code, and compiling takes longer than all else that they do at their start.
python -m compileall -q snapshotter providers tests/support.py tests/hot >/dev/null 2>&1 </dev/null &

finish() {
    tar -c -C /results . >/dev/nvme0n3
    blockdev --flushbufs /dev/nvme0n3
    sleep 0.2
    echo o >/proc/sysrq-trigger
    sleep 60
}

# A hang: say who hangs, and where, let pytest write down what it has, and end in any case.
if [ "$LIMIT" -gt 0 ]; then
    (
        sleep "$LIMIT"
        echo "$LIMIT" >/results/limit
        {
            echo "lab: the time limit of $LIMIT s is over; what runs now:"
            ps -eo pid,ppid,stat,wchan:24,etimes,args --sort=pid | awk '$2 != 2' | cut -c1-160
            timeout 10 dmsetup info -c -o name,suspended
        } >/dev/hvc0 2>&1 </dev/null
        dmesg -n 7
        echo w >/proc/sysrq-trigger
        pkill -INT -f '^/opt/venv/bin/python -m pytest' || pkill -TERM -s "$(cat /run/job.pid)"
        sleep 60
        finish
    ) &
fi

if [ -f /checkout/.lab/interactive ]; then
    stty -F /dev/hvc0 sane
    [ -f /checkout/.lab/size ] && stty -F /dev/hvc0 $(cat /checkout/.lab/size)
    setsid -c /bin/bash /checkout/.lab/job </dev/hvc0 >/dev/hvc0 2>&1 &
else
    # Through a pipe, so that programs see no terminal. A daemon that the job left behind may hold the pipe open.
    stty -F /dev/hvc0 raw -echo
    mkfifo /run/output
    cat </run/output >/dev/hvc0 &
    relay=$!
    setsid /bin/bash /checkout/.lab/job </dev/null >/run/output 2>&1 &
fi
echo $! >/run/job.pid
wait $!
echo $? >/results/status
for _ in {1..30}; do
    kill -0 "${relay:-0}" 2>/dev/null && [ -n "${relay:-}" ] || break
    sleep 0.1
done
finish
