# SPDX-License-Identifier: Apache-2.0
"""Every export of the published dstack-sdk against a running agent. The endpoints
are in the environment as `dstack simulator` prints them."""

import asyncio
import hashlib
import inspect
import json
import os
import time
import unittest
import warnings

import dstack_sdk
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from dstack_sdk import (
    AsyncDstackClient,
    AsyncTappdClient,
    DstackClient,
    EnvVar,
    TappdClient,
    encrypt_env_vars,
    encrypt_env_vars_sync,
    get_compose_hash,
    verify_env_encrypt_public_key,
    verify_env_encrypt_public_key_legacy,
)
from dstack_sdk.ethereum import to_account, to_account_secure
from dstack_sdk.solana import to_keypair, to_keypair_secure
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_keys import keys
from eth_utils import keccak

warnings.simplefilter("ignore", DeprecationWarning)


def vector(name):
    with open(os.path.join(os.environ["SDK_VECTORS"], name), encoding="utf-8") as f:
        return json.load(f)


def public_key(algorithm, key):
    if algorithm == "ed25519":
        return ed25519.Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()
    return keys.PrivateKey(key).public_key.to_compressed_bytes()


def signer(message, signature):
    return keys.Signature(signature).recover_public_key_from_msg_hash(keccak(message)).to_compressed_bytes()


def methods(cls):
    return {n for n, _ in inspect.getmembers(cls, callable) if not n.startswith("_")}


DSTACK = {"attest", "emit_event", "get_key", "get_quote", "get_tls_key", "info", "is_reachable", "sign", "verify", "version"}


class Exports(unittest.TestCase):
    def test_every_export_is_known(self):
        self.assertEqual(set(dstack_sdk.__all__), {
            "DstackClient", "AsyncDstackClient", "AsyncTappdClient", "TappdClient", "GetKeyResponse", "GetTlsKeyResponse", "AttestResponse",
            "GetQuoteResponse", "InfoResponse", "TcbInfo", "EventLog", "VersionResponse", "encrypt_env_vars_sync", "encrypt_env_vars", "EnvVar",
            "get_compose_hash", "AppCompose", "DockerConfig", "verify_env_encrypt_public_key", "verify_env_encrypt_public_key_legacy"})
        for cls, want in ((DstackClient, DSTACK), (AsyncDstackClient, DSTACK), (TappdClient, DSTACK | {"derive_key", "tdx_quote"}), (AsyncTappdClient, DSTACK | {"derive_key", "tdx_quote"})):
            self.assertEqual(methods(cls), want, cls)


class Asynchronous:
    """An asynchronous client that is called like a synchronous one."""

    def __init__(self, cls, endpoint=None):
        self.cls, self.endpoint = cls, endpoint

    def __getattr__(self, name):
        def call(*args, **kwargs):
            async def run():
                async with self.cls(self.endpoint) as client:
                    return await getattr(client, name)(*args, **kwargs)

            return asyncio.run(run())

        return call


class Methods:
    """The methods that every client has."""

    event = "event"

    def test_version(self):
        v = self.client.version()
        self.assertRegex(v.version, r"^\d+\.\d+\.\d+")
        self.assertTrue(v.rev)
        self.assertTrue(self.client.is_reachable())

    def test_info(self):
        info = self.client.info()
        for name, length in (("app_id", 40), ("instance_id", 40), ("device_id", 64), ("mr_aggregated", 64), ("os_image_hash", 64), ("compose_hash", 64)):
            self.assertRegex(getattr(info, name), "^[0-9a-f]{%d}$" % length, name)
        for name in ("mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3"):
            self.assertRegex(getattr(info.tcb_info, name), "^[0-9a-f]{96}$")
        self.assertEqual(hashlib.sha256(info.tcb_info.app_compose.encode()).hexdigest(), info.compose_hash)
        self.assertIn("system-ready", [e.event for e in info.tcb_info.event_log])
        self.assertIn("demo-cert", x509.load_pem_x509_certificate(info.app_cert.encode()).subject.rfc4514_string())
        self.assertTrue(info.app_name and info.key_provider_info)

    def test_get_key(self):
        app = None
        for algorithm in ("secp256k1", "k256", "", "ed25519"):
            k = self.client.get_key("test/wallet", "signing", algorithm)
            self.assertEqual(len(k.decode_key()), 32)
            chain = k.decode_signature_chain()
            self.assertEqual(len(chain), 2)
            got = signer(b"signing:" + public_key(algorithm, k.decode_key()).hex().encode(), chain[0])
            app = app or got
            self.assertEqual(got, app)
            self.assertNotEqual(k.key, self.client.get_key("/test/wallet", "signing", algorithm).key)
        self.assertEqual(self.client.get_key().key, self.client.get_key("", "x").key)
        for algorithm in ("rsa", "secp256k1_prehashed"):
            with self.assertRaises(Exception):
                self.client.get_key("x", "y", algorithm)

    def test_get_tls_key(self):
        start = int(time.time()) - 60
        made = self.client.get_tls_key("my app", ["localhost", "127.0.0.1"], True, True, True, not_before=start, not_after=start + 86400, with_app_info=True)
        leaf, *rest = [x509.load_pem_x509_certificate(c.encode()) for c in made.certificate_chain]
        self.assertTrue(rest)
        for child, parent in zip([leaf, *rest], rest):
            child.verify_directly_issued_by(parent)
        self.assertEqual(load_pem_private_key(made.key.encode(), None).public_key(), leaf.public_key())
        san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.assertEqual([str(n.value) for n in san], ["localhost", "127.0.0.1"])
        self.assertEqual(leaf.not_valid_before_utc.timestamp(), start)
        self.assertEqual(leaf.not_valid_after_utc.timestamp(), start + 86400)
        oids = [e.oid.dotted_string for e in leaf.extensions]
        self.assertIn("1.3.6.1.4.1.62397.1.8", oids)
        self.assertIn("1.3.6.1.4.1.62397.1.9", oids)
        self.assertEqual(len(made.as_uint8array()), 138)
        self.assertEqual(len(made.as_uint8array(32)), 32)
        self.assertNotEqual(self.client.get_tls_key().key, made.key)

    def test_quotes(self):
        q = self.client.get_quote("test")
        self.assertEqual(q.report_data, b"test".hex().ljust(128, "0"))
        self.assertEqual(q.decode_quote()[568:632].hex(), q.report_data)
        tcb = self.client.info().tcb_info
        self.assertEqual(q.replay_rtmrs(), {0: tcb.rtmr0, 1: tcb.rtmr1, 2: tcb.rtmr2, 3: q.decode_quote()[520:568].hex()})
        self.assertIn("compose-hash", [e.event for e in q.decode_event_log()])
        self.assertIn(bytes.fromhex(q.report_data), self.client.attest(b"test").decode_attestation())

    def test_emit_event(self):
        self.client.emit_event(self.event, "payload")
        q = self.client.get_quote("after")
        self.assertEqual(q.replay_rtmrs()[3], q.decode_quote()[520:568].hex())
        self.assertIn(self.event, [e.event for e in q.decode_event_log()])
        with self.assertRaises(Exception):
            self.client.emit_event("compose-hash", b"x")

    def test_sign_and_verify(self):
        data = b"message to be signed"
        for algorithm, message in (("ed25519", data), ("secp256k1", data), ("k256", data), ("secp256k1_prehashed", hashlib.sha256(data).digest())):
            s = self.client.sign(algorithm, message)
            self.assertEqual(s.decode_signature_chain()[0], s.decode_signature())
            self.assertEqual(len(s.signature_chain), 3)
            self.assertTrue(self.client.verify(algorithm, message, s.decode_signature(), s.decode_public_key()).valid)
            self.assertFalse(self.client.verify(algorithm, bytes(32), s.decode_signature(), s.decode_public_key()).valid)
        with self.assertRaises(Exception):
            self.client.sign("rsa", data)

    def test_wallets(self):
        key = self.client.get_key("eth/test", "wallet")
        for make in (to_account, to_account_secure):
            account = make(key)
            self.assertEqual(account.address, keys.PrivateKey(key.decode_key()).public_key.to_checksum_address())
            message = encode_defunct(text="hello")
            self.assertEqual(Account.recover_message(message, signature=account.sign_message(message).signature), account.address)
        for make in (to_keypair, to_keypair_secure):
            self.assertEqual(bytes(make(key).pubkey()), public_key("ed25519", key.decode_key()))
        tls = self.client.get_tls_key()
        self.assertTrue(to_account_secure(tls).address)
        self.assertTrue(to_keypair_secure(tls).pubkey())


class Legacy(Methods):
    """And those of the clients of tappd."""

    def test_derive_key(self):
        made = self.client.derive_key("test/key", "subject", ["a.example"])
        self.assertEqual(made.key, self.client.derive_key("test/key").key)
        leaf, ca = [x509.load_pem_x509_certificate(c.encode()) for c in made.certificate_chain]
        leaf.verify_directly_issued_by(ca)
        self.assertIn("CN=subject", leaf.subject.rfc4514_string())
        self.assertEqual(made.as_uint8array()[36:68].hex(), self.client.get_key("test/key").key)

    def test_tdx_quote(self):
        self.assertEqual(self.client.tdx_quote("test", "raw").decode_quote()[568:632], b"test".rjust(64, b"\0"))
        for v in vector("guest-agent/crypto.json")["report_data"]:
            if v["prefix"] == "app-data":
                q = self.client.tdx_quote(bytes.fromhex(v["content_hex"]), v["hash_algorithm"])
                self.assertEqual(q.decode_quote()[568:632].hex(), v["report_data"], v["hash_algorithm"])
        with self.assertRaises(Exception):
            self.client.tdx_quote("x", "md5")


class OverSocket(Methods, unittest.TestCase):
    event = "py-socket"

    def setUp(self):
        self.client = DstackClient()


class OverHTTP(Methods, unittest.TestCase):
    event = "py-http"

    def setUp(self):
        self.client = DstackClient(os.environ["SDK_HTTP"])


class Async(Methods, unittest.TestCase):
    event = "py-async"

    def setUp(self):
        self.client = Asynchronous(AsyncDstackClient)


class Tappd(Legacy, unittest.TestCase):
    event = "py-tappd"

    def setUp(self):
        self.client = TappdClient()


class AsyncTappd(Legacy, unittest.TestCase):
    event = "py-tappd-async"

    def setUp(self):
        self.client = Asynchronous(AsyncTappdClient)


class Context(unittest.TestCase):
    def test_with(self):
        for cls in (DstackClient, TappdClient):
            with cls() as client:
                self.assertTrue(client.is_reachable())


class Helpers(unittest.TestCase):
    def test_compose_hash(self):
        for v in vector("guest-agent/compose-hash.json"):
            self.assertEqual(get_compose_hash(v["input"], v["normalize"]), v["sha256"])

    def test_env_public_key(self):
        v = vector("guest-agent/crypto.json")["env_encrypt_pubkey_legacy"]
        public, signature = bytes.fromhex(v["public_key"]), bytes.fromhex(v["signature"])
        self.assertEqual(verify_env_encrypt_public_key_legacy(public, signature, v["app_id"]), v["signer"])
        self.assertIsNone(verify_env_encrypt_public_key(public, signature, v["app_id"], 1))
        root, now = keys.PrivateKey(bytes([1]) * 32), int(time.time())
        message = b"dstack-env-encrypt-pubkey:" + bytes.fromhex(v["app_id"]) + now.to_bytes(8, "big") + public
        signed = root.sign_msg_hash(keccak(message)).to_bytes()
        self.assertEqual(verify_env_encrypt_public_key(public, signed, v["app_id"], now), "0x" + root.public_key.to_compressed_bytes().hex())

    def test_encrypt_env_vars(self):
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw().hex()
        env = [EnvVar(key="A", value="b")]
        for sealed in (encrypt_env_vars_sync(env, public), asyncio.run(encrypt_env_vars(env, public))):
            raw = bytes.fromhex(sealed)
            shared = private.exchange(X25519PublicKey.from_public_bytes(raw[:32]))
            self.assertEqual(json.loads(AESGCM(shared).decrypt(raw[32:44], raw[44:], None)), {"env": [{"key": "A", "value": "b"}]})


if __name__ == "__main__":
    unittest.main()
