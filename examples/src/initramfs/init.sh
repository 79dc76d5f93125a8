#!/bin/busybox sh
# The guest's first process: runs what /vmm/run says and powers off. That file sets
#   mode      command, shell or log
#   command   the shell line, and input, the file that it reads
#   console, output, errors, control: the serial ports, or what stands for them
#   shared    not empty if they are all the one console: each line then has a mark of whose it is
#   modules   the kernel modules to load first
#   ports     names of the ports of virtio consoles
#   saved     not empty if the machine may be saved, and go on at another time
# Every program that is started here costs the guest time, so there are few.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root USER=root
mount -a
. /vmm/run
mark=
if [ -n "$shared" ]; then
    mark='C '
    stty -F "$console" -echo
fi
echo "${mark}init" >"$control"
if [ -n "$saved" ]; then
    # For programs that want that; they go on in another process of the host's, which says what time it is. Nobody waits for who listens.
    printf '#!/bin/sh\necho "%ssnapshot" >%s\n' "$mark" "$control" >/bin/snapshot
    chmod +x /bin/snapshot
fi
# A paravirtual guest has the time from its hypervisor.
if [ -n "$saved" ] && [ -z "$shared" ]; then
    stty -F "$control" -echo
    (while read -r word seconds; do
        [ "$word" != clock ] || date -s "@$seconds"
    done <"$control" >/dev/null 2>&1 &)
fi
[ -z "$modules" ] || modprobe -a $modules
# The device says their names when the driver is there; that one that has no driver ends the wait as well.
[ -z "$ports" ] || mkdir /dev/virtio-ports
for name in $ports; do
    for second in 0 1 2 3 4 5 6 7 8 9; do
        port=$(grep -lFx "$name" /sys/class/virtio-ports/*/name 2>/dev/null) && break
        sleep 1
    done
    port=${port%/name}
    [ -z "$port" ] || ln -s "/dev/${port##*/}" "/dev/virtio-ports/$name"
done

case $mode in
command)
    # The command writes into pipes: a terminal would change how programs write, and they could change the terminal.
    if [ -n "$shared" ]; then
        # Nothing of the kernel's between the lines.
        dmesg -n 1
        base64 </vmm/output | sed 's/^/O /' >"$output" &
        base64 </vmm/errors | sed 's/^/E /' >"$errors" &
    else
        stty -F "$output" raw
        stty -F "$errors" raw
        cat </vmm/output >"$output" &
        cat </vmm/errors >"$errors" &
    fi
    last=$!
    /bin/sh -c "$command" <"$input" >/vmm/output 2>/vmm/errors
    status=$?
    # What the command left running, all of it younger than the pipes, would keep them open.
    for process in /proc/[0-9]*; do
        process=${process#/proc/}
        [ "$process" -le "$last" ] || kill -9 "$process"
    done 2>/dev/null
    # A port is closed when all of its bytes are out.
    wait
    ;;
shell)
    stty -F "$console" echo rows "$rows" cols "$columns"
    export TERM="$term"
    cd "$HOME"
    # The first terminal that the leader of a session opens becomes its own, with job control.
    setsid sh -c 'exec /bin/sh -i <"$0" >"$0" 2>&1' "$console"
    status=$?
    ;;
log)
    status=0
    ;;
esac
echo "${mark}status $status" >"$control"
poweroff -f
