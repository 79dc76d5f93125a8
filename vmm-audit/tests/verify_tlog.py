"""Checks a log that was exported as tiles, from the published formats alone (C2SP signed-note, tlog-checkpoint and
tlog-tiles, RFC 6962, RFC 8032). It shares nothing with the crate. Usage: verify_tlog.py DIR NAME+HASH+BASE64"""
import base64, hashlib, os, sys

# Ed25519, RFC 8032, 5.1.7.
P, L = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P

def add(p, q):
    a, b = (p[1] - p[0]) * (q[1] - q[0]) % P, (p[1] + p[0]) * (q[1] + q[0]) % P
    c, d = 2 * p[3] * q[3] * D % P, 2 * p[2] * q[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P

def multiply(s, p):
    q = (0, 1, 1, 0)
    while s:
        q, p, s = add(q, p) if s & 1 else q, add(p, p), s >> 1
    return q

def recover(y, sign):
    x2 = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(x2, (P + 3) // 8, P)
    if (x * x - x2) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    assert (x * x - x2) % P == 0, "not a point"
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P

def point(data):
    y = int.from_bytes(data, "little")
    return recover(y & (1 << 255) - 1, y >> 255)

BASE = recover(4 * pow(5, P - 2, P) % P, 0)

def verify(key, message, signature):
    r, s = signature[:32], int.from_bytes(signature[32:], "little")
    h = int.from_bytes(hashlib.sha512(r + key + message).digest(), "little") % L
    a, b = multiply(s, BASE), add(point(r), multiply(h, point(key)))
    return s < L and (a[0] * b[2] - b[0] * a[2]) % P == 0 and (a[1] * b[2] - b[1] * a[2]) % P == 0

# Notes and checkpoints.
def open_note(note, vkey):
    name, key_id, key = vkey.split("+", 2)
    key = base64.b64decode(key, validate=True)
    digest = hashlib.sha256(name.encode() + b"\n" + key).digest()
    assert key[0] == 1 and digest[:4].hex() == key_id, "not an Ed25519 verifier key"
    text, _, signatures = note.rpartition("\n\n")
    text += "\n"
    for line in signatures.splitlines():
        dash, signer, signature = line.split(" ")
        signature = base64.b64decode(signature, validate=True)
        if (dash, signer, signature[:4].hex()) == ("\u2014", name, key_id):
            assert verify(key[1:], text.encode(), signature[4:]), "the signature does not fit"
            return text.splitlines()
    raise AssertionError("not signed by " + vkey)

# Tiles.
def node(left, right):
    return hashlib.sha256(b"\1" + left + right).digest()

def mth(hashes):
    if len(hashes) < 2:
        return hashes[0] if hashes else hashlib.sha256(b"").digest()
    k = 1 << (len(hashes) - 1).bit_length() - 1
    return node(mth(hashes[:k]), mth(hashes[k:]))

def path(root, kind, index, width):
    parts = ["%03d" % (index % 1000)]
    while index := index // 1000:
        parts.insert(0, "x%03d" % (index % 1000))
    return os.path.join(root, "tile", kind, *parts) + (".p/%d" % width if width < 256 else "")

def main(root, vkey):
    origin, size, tree_root, *_ = open_note(open(os.path.join(root, "checkpoint"), encoding="utf-8").read(), vkey)
    assert origin == vkey.split("+")[0], "another log"
    level, hashes = 0, []
    for index in range(-(-int(size) // 256)):
        width = min(256, int(size) - index * 256)
        bundle, leaves = open(path(root, "entries", index, width), "rb").read(), []
        while bundle:
            length = int.from_bytes(bundle[:2], "big")
            leaves.append(hashlib.sha256(b"\0" + bundle[2:2 + length]).digest())
            bundle = bundle[2 + length:]
        assert len(leaves) == width, "entry bundle %d has %d entries" % (index, len(leaves))
        hashes += leaves
    leaves = hashes
    while hashes:
        for index in range(-(-len(hashes) // 256)):
            row = hashes[index * 256:index * 256 + 256]
            assert open(path(root, str(level), index, len(row)), "rb").read() == b"".join(row), "tile %d/%d" % (level, index)
        level, hashes = level + 1, [mth(hashes[n:n + 256]) for n in range(0, len(hashes) // 256 * 256, 256)]
    assert mth(leaves) == base64.b64decode(tree_root), "the root is another"
    print("ok", size)

main(*sys.argv[1:])
