// SPDX-License-Identifier: Apache-2.0
//
// Every export of the published @phala/dstack-sdk against a running agent. The
// endpoints are in the environment as `dstack simulator` prints them.
import assert from 'node:assert/strict'
import { Buffer } from 'node:buffer'
import { X509Certificate, createPrivateKey, sign, verify as verifySignature } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'

import { ed25519 } from '@noble/curves/ed25519'
import { secp256k1 } from '@noble/curves/secp256k1'
import { sha256 } from '@noble/hashes/sha2'
import { keccak_256 } from '@noble/hashes/sha3'
import * as sdk from '@phala/dstack-sdk'
import * as composeHash from '@phala/dstack-sdk/get-compose-hash'
import * as encrypt from '@phala/dstack-sdk/encrypt-env-vars'
import * as solana from '@phala/dstack-sdk/solana'
import * as verifyEnv from '@phala/dstack-sdk/verify-env-encrypt-public-key'
import * as viem from '@phala/dstack-sdk/viem'
import { recoverMessageAddress } from 'viem'

const { DstackClient, TappdClient, to_hex } = sdk
const hex = (b) => Buffer.from(b).toString('hex')
const vector = (name) => JSON.parse(readFileSync(`${process.env.SDK_VECTORS}/${name}`, 'utf8'))
const endpoints = [process.env.DSTACK_SIMULATOR_ENDPOINT, process.env.SDK_HTTP]

// What this test calls: a newer SDK with more must not pass unnoticed.
test('every export is known', () => {
	const methods = (c) => Object.getOwnPropertyNames(c.prototype).filter((n) => n !== 'constructor' && !n.startsWith('ensure')).sort()
	assert.deepEqual(Object.keys(sdk).sort(), ['DstackClient', 'TappdClient', 'getComposeHash', 'to_hex', 'verifyEnvEncryptPublicKey', 'verifyEnvEncryptPublicKeyLegacy'])
	assert.deepEqual(methods(DstackClient), ['attest', 'deriveKey', 'emitEvent', 'getKey', 'getQuote', 'getTlsKey', 'info', 'isReachable', 'sign', 'tdxQuote', 'verify', 'version'])
	assert.deepEqual(methods(TappdClient), ['deriveKey', 'isReachable', 'tdxQuote'])
	for (const [module, names] of [[viem, ['toViemAccount', 'toViemAccountSecure']], [solana, ['toKeypair', 'toKeypairSecure']],
		[encrypt, ['encryptEnvVars']], [composeHash, ['getComposeHash']], [verifyEnv, ['verifyEnvEncryptPublicKey', 'verifyEnvEncryptPublicKeyLegacy']]]) {
		assert.deepEqual(Object.keys(module).sort(), names)
	}
})

test('the endpoint is found in the environment', async () => {
	const info = await new DstackClient().info()
	const old = await new TappdClient().info()
	assert.equal(info.app_id, old.app_id)
})

// recoverSigner returns the compressed public key that signed keccak256(message).
function recoverSigner(message, signature) {
	assert.equal(signature.length, 65)
	return secp256k1.Signature.fromCompact(signature.slice(0, 64)).addRecoveryBit(signature[64]).recoverPublicKey(keccak_256(message)).toHex(true)
}

const publicKey = (algorithm, key) => algorithm === 'ed25519' ? ed25519.getPublicKey(key) : secp256k1.getPublicKey(key, true)

for (const endpoint of endpoints) {
	const client = new DstackClient(endpoint)
	const at = (name) => `${name} (${endpoint.startsWith('http') ? 'http' : 'socket'})`

	test(at('version and isReachable'), async () => {
		const v = await client.version()
		assert.match(v.version, /^\d+\.\d+\.\d+/)
		assert.notEqual(v.rev, '')
		assert.equal(await client.isReachable(), true)
	})

	test(at('info'), async () => {
		const info = await client.info()
		for (const [name, length] of [['app_id', 40], ['instance_id', 40], ['device_id', 64], ['mr_aggregated', 64], ['os_image_hash', 64], ['compose_hash', 64]]) {
			assert.match(info[name], new RegExp(`^[0-9a-f]{${length}}$`), name)
		}
		for (const name of ['mrtd', 'rtmr0', 'rtmr1', 'rtmr2', 'rtmr3']) assert.match(info.tcb_info[name], /^[0-9a-f]{96}$/)
		assert.equal(hex(sha256(Buffer.from(info.tcb_info.app_compose))), info.compose_hash)
		assert.equal(info.tcb_info.compose_hash, info.compose_hash)
		assert.equal(typeof JSON.parse(info.key_provider_info).name, 'string')
		assert.ok(info.tcb_info.event_log.some((e) => e.event === 'system-ready'))
		assert.ok(info.app_name.length > 0)
		assert.match(new X509Certificate(info.app_cert).subject, /demo-cert/)
	})

	for (const algorithm of ['secp256k1', 'k256', '', 'ed25519']) {
		test(at(`getKey ${algorithm || 'by default'}`), async () => {
			const a = await client.getKey('test/wallet', 'signing', algorithm)
			assert.equal(a.__name__, 'GetKeyResponse')
			assert.equal(a.key.length, 32)
			assert.equal(a.signature_chain.length, 2)
			assert.deepEqual(a.key, (await client.getKey('test/wallet', 'other', algorithm)).key)
			assert.notDeepEqual(a.key, (await client.getKey('/test/wallet', 'signing', algorithm)).key)
			// One app key signs every derived key, whatever the algorithm.
			const b = await client.getKey('another', 'p', 'ed25519')
			const signer = recoverSigner(Buffer.from('signing:' + hex(publicKey(algorithm, a.key))), a.signature_chain[0])
			assert.equal(signer, recoverSigner(Buffer.from('p:' + hex(publicKey('ed25519', b.key))), b.signature_chain[0]))
		})
	}

	test(at('getKey refuses what is no key algorithm'), async () => {
		await assert.rejects(client.getKey('x', 'y', 'rsa'))
		await assert.rejects(client.getKey('x', 'y', 'secp256k1_prehashed'))
	})

	test(at('getTlsKey'), async () => {
		const from = Math.floor(Date.now() / 1000) - 60, to = from + 86400
		const made = await client.getTlsKey({
			path: 'ignored', subject: 'my app', altNames: ['localhost', '127.0.0.1', 'app.example'], usageRaTls: true, usageServerAuth: true, usageClientAuth: true,
			notBefore: from, notAfter: to, withAppInfo: true,
		})
		assert.equal(made.__name__, 'GetTlsKeyResponse')
		const chain = made.certificate_chain.map((pem) => new X509Certificate(pem))
		assert.ok(chain.length >= 2)
		for (let i = 0; i + 1 < chain.length; i++) assert.ok(chain[i].verify(chain[i + 1].publicKey))
		const [leaf] = chain
		assert.ok(leaf.checkPrivateKey(createPrivateKey(made.key)))
		assert.match(leaf.subject, /CN=my app/)
		assert.equal(leaf.subjectAltName, 'DNS:localhost, IP Address:127.0.0.1, DNS:app.example')
		assert.deepEqual(leaf.keyUsage, ['1.3.6.1.5.5.7.3.1', '1.3.6.1.5.5.7.3.2'])
		assert.equal(Date.parse(leaf.validFrom), from * 1000)
		assert.equal(Date.parse(leaf.validTo), to * 1000)
		assert.equal(made.asUint8Array().length, 138)
		assert.equal(made.asUint8Array(32).length, 32)

		const plain = await client.getTlsKey()
		const bare = new X509Certificate(plain.certificate_chain[0])
		assert.equal(bare.subjectAltName, undefined)
		assert.deepEqual(bare.keyUsage, ['1.3.6.1.5.5.7.3.1'])
		assert.notEqual(plain.key, (await client.getTlsKey()).key)
		assert.ok(leaf.raw.length > bare.raw.length + 5000, 'the evidence is not in the certificate')
	})

	test(at('getQuote, attest'), async () => {
		const q = await client.getQuote('test')
		assert.equal(q.report_data, Buffer.from('test').toString('hex').padEnd(128, '0'))
		// The report data lies at byte 568 of a TDX quote of version 4.
		assert.equal(q.quote.slice(2 * 568, 2 * 632), q.report_data)
		assert.equal(typeof JSON.parse(q.vm_config), 'object')
		const { tcb_info } = await client.info()
		assert.deepEqual(q.replayRtmrs(), [tcb_info.rtmr0, tcb_info.rtmr1, tcb_info.rtmr2, tcb_info.rtmr3])
		assert.equal(q.quote.slice(2 * 520, 2 * 568), tcb_info.rtmr3)
		for (const data of [Buffer.alloc(64, 7), new Uint8Array(64), Buffer.alloc(0)]) await client.getQuote(data)
		await assert.rejects(client.getQuote(Buffer.alloc(65)))

		const a = await client.attest(Buffer.from('test'))
		assert.equal(a.__name__, 'AttestResponse')
		assert.ok(a.attestation.includes(q.report_data))
		await assert.rejects(client.attest(Buffer.alloc(65)))
	})

	test(at('emitEvent'), async () => {
		const name = endpoint.startsWith('http') ? 'over-http' : 'over-socket'
		await client.emitEvent(name, Buffer.from('payload'))
		await client.emitEvent(name, 'text')
		const { tcb_info } = await client.info()
		const logged = tcb_info.event_log.filter((e) => e.event === name)
		assert.deepEqual(logged.map((e) => Buffer.from(e.event_payload, 'hex').toString()), ['payload', 'text'])
		const q = await client.getQuote('after')
		assert.equal(q.quote.slice(2 * 520, 2 * 568), tcb_info.rtmr3)
		assert.equal(q.replayRtmrs()[3], tcb_info.rtmr3)
		await assert.rejects(client.emitEvent('', 'x'))
	})

	test(at('sign and verify'), async () => {
		const data = Buffer.from('message to be signed')
		const digest = sha256(data)
		for (const [algorithm, input] of [['ed25519', data], ['secp256k1', data], ['k256', data], ['secp256k1_prehashed', digest]]) {
			const s = await client.sign(algorithm, input)
			assert.equal(s.__name__, 'SignResponse')
			assert.equal(s.signature_chain.length, 3)
			assert.deepEqual(s.signature_chain[0], s.signature)
			assert.equal((await client.verify(algorithm, input, s.signature, s.public_key)).valid, true)
			const other = Buffer.from(input)
			other[0] ^= 1
			assert.equal((await client.verify(algorithm, other, s.signature, s.public_key)).valid, false)
			if (algorithm === 'ed25519') {
				assert.ok(ed25519.verify(s.signature, data, s.public_key))
			} else {
				assert.ok(secp256k1.verify(s.signature, digest, s.public_key))
			}
			const signer = recoverSigner(Buffer.from('signing:' + hex(s.public_key)), s.signature_chain[1])
			const k = await client.getKey('x', 'y')
			assert.equal(signer, recoverSigner(Buffer.from('y:' + hex(publicKey('k256', k.key))), k.signature_chain[0]))
		}
		assert.equal((await client.sign('ed25519', 'text')).signature.length, 64)
		await assert.rejects(client.sign('rsa', data))
		await assert.rejects(client.sign('secp256k1_prehashed', data))
	})

	test(at('wallets'), async () => {
		for (const make of [viem.toViemAccount, viem.toViemAccountSecure]) {
			const key = await client.getKey('eth/test', 'wallet')
			const account = make(key)
			const point = secp256k1.getPublicKey(key.key, false).slice(1)
			assert.equal(account.address.toLowerCase(), '0x' + hex(keccak_256(point).slice(12)))
			const message = 'hello'
			assert.equal(await recoverMessageAddress({ message, signature: await account.signMessage({ message }) }), account.address)
		}
		for (const make of [solana.toKeypair, solana.toKeypairSecure]) {
			const key = await client.getKey('sol/test', 'wallet', 'ed25519')
			assert.equal(hex(make(key).publicKey.toBytes()), hex(ed25519.getPublicKey(key.key)))
		}
		const tls = await client.getTlsKey()
		assert.match(viem.toViemAccountSecure(tls).address, /^0x/)
		assert.equal(solana.toKeypairSecure(tls).secretKey.length, 64)
	})

	// What the SDK itself gave up: it says so without asking.
	test(at('deprecated methods of DstackClient'), async () => {
		await assert.rejects(client.deriveKey('x'), /deprecated/)
		await assert.rejects(client.tdxQuote('x'), /only supports raw/)
		assert.equal((await client.tdxQuote('x', 'raw')).report_data, '78'.padEnd(128, '0'))
	})
}

const tappd = new TappdClient(process.env.TAPPD_SIMULATOR_ENDPOINT)

test('tappd: deriveKey', async () => {
	const a = await tappd.deriveKey('test/key', 'subject', ['a.example'])
	assert.equal(a.key, (await tappd.deriveKey('test/key')).key)
	assert.notEqual(a.key, (await tappd.deriveKey('other')).key)
	const [leaf, ca] = a.certificate_chain.map((pem) => new X509Certificate(pem))
	assert.ok(leaf.verify(ca.publicKey) && leaf.checkPrivateKey(createPrivateKey(a.key)))
	assert.equal(leaf.subjectAltName, 'DNS:a.example')
	// The scalar is the key of that path (guest-agent.md §8.1).
	const raw = await new DstackClient().getKey('test/key')
	assert.equal(hex(a.asUint8Array().slice(36, 68)), hex(raw.key))
	const signature = sign('sha256', Buffer.from('x'), createPrivateKey(a.key))
	assert.ok(verifySignature('sha256', Buffer.from('x'), leaf.publicKey, signature))
})

test('tappd: tdxQuote', async () => {
	const at = (q) => q.quote.slice(2 * 568, 2 * 632)
	const plain = await tappd.tdxQuote('test')
	const sha512 = vector('guest-agent/crypto.json').report_data.find((v) => v.hash_algorithm === 'sha512' && v.prefix === 'app-data')
	assert.equal(at(plain), sha512.report_data)
	for (const v of vector('guest-agent/crypto.json').report_data.filter((v) => v.prefix === 'app-data')) {
		const q = await tappd.tdxQuote(Buffer.from(v.content_hex, 'hex'), v.hash_algorithm)
		assert.equal(at(q), v.report_data, v.hash_algorithm)
		assert.equal(q.replayRtmrs()[3], q.quote.slice(2 * 520, 2 * 568))
	}
	assert.equal(at(await tappd.tdxQuote('test', 'raw')), Buffer.from('test').toString('hex').padStart(128, '0'))
	await assert.rejects(tappd.tdxQuote(Buffer.alloc(65), 'raw'))
	await assert.rejects(tappd.tdxQuote('x', 'md5'))
})

test('tappd: what it inherits', async () => {
	const info = await tappd.info()
	assert.match(info.tcb_info.mrtd, /^[0-9a-f]{96}$/)
	assert.equal(await tappd.isReachable(), true)
	const client = new DstackClient()
	assert.deepEqual(await tappd.version(), await client.version())
	assert.deepEqual(await tappd.getKey('a', 'b'), await client.getKey('a', 'b'))
	assert.deepEqual((await tappd.sign('ed25519', 'x')).signature, (await client.sign('ed25519', 'x')).signature)
	const s = await tappd.sign('secp256k1', 'x')
	assert.equal((await tappd.verify('secp256k1', 'x', s.signature, s.public_key)).valid, true)
	assert.equal((await tappd.getQuote('x')).report_data.slice(0, 2), '78')
	assert.ok((await tappd.attest('x')).attestation.length > 0)
	assert.equal((await tappd.getTlsKey()).certificate_chain.length >= 2, true)
	await tappd.emitEvent('over-tappd', 'x')
})

test('pure helpers', async () => {
	assert.equal(to_hex('test'), '74657374')
	assert.equal(to_hex(Buffer.from([1, 255])), '01ff')
	for (const v of vector('guest-agent/compose-hash.json')) {
		assert.equal(sdk.getComposeHash(v.input, v.normalize), v.sha256)
		assert.equal(composeHash.getComposeHash(v.input, v.normalize), v.sha256)
	}
	const legacy = vector('guest-agent/crypto.json').env_encrypt_pubkey_legacy
	const bytes = (text) => Uint8Array.from(Buffer.from(text, 'hex'))
	assert.equal(sdk.verifyEnvEncryptPublicKeyLegacy(bytes(legacy.public_key), bytes(legacy.signature), legacy.app_id), legacy.signer)
	assert.equal(sdk.verifyEnvEncryptPublicKey(bytes(legacy.public_key), bytes(legacy.signature), legacy.app_id, 1), null)

	// A key that the app signed, as a KMS signs one for clients.
	const root = secp256k1.utils.randomPrivateKey(), time = Math.floor(Date.now() / 1000)
	const stamp = Buffer.alloc(8)
	stamp.writeBigUInt64BE(BigInt(time))
	const { key } = await new DstackClient().getKey('env', 'x', 'ed25519')
	const app = (await new DstackClient().info()).app_id
	const signed = secp256k1.sign(keccak_256(Buffer.concat([Buffer.from('dstack-env-encrypt-pubkey:'), Buffer.from(app, 'hex'), stamp, key])), root)
	const signature = Uint8Array.from([...signed.toCompactRawBytes(), signed.recovery])
	assert.equal(sdk.verifyEnvEncryptPublicKey(key, signature, app, time), '0x' + hex(secp256k1.getPublicKey(root, true)))

	const { x25519 } = await import('@noble/curves/ed25519')
	const recipient = x25519.utils.randomPrivateKey()
	const sealed = Buffer.from(await encrypt.encryptEnvVars([{ key: 'A', value: 'b' }], hex(x25519.getPublicKey(recipient))), 'hex')
	const aes = await crypto.subtle.importKey('raw', x25519.getSharedSecret(recipient, sealed.subarray(0, 32)), 'AES-GCM', false, ['decrypt'])
	const text = await crypto.subtle.decrypt({ name: 'AES-GCM', iv: sealed.subarray(32, 44) }, aes, sealed.subarray(44))
	assert.deepEqual(JSON.parse(Buffer.from(text).toString()), { env: [{ key: 'A', value: 'b' }] })
})
