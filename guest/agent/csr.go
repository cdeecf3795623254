// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
)

// csrWord begins every signing request.
const csrWord = "please sign cert:"

// signingRequest encodes a certificate signing request of upstream's second form
// (guest-agent.md §9.2): SCALE, the evidence last and without a length.
func signingRequest(spki []byte, r certRequest, evidence []byte) []byte {
	var out []byte
	bytes := func(b []byte) { out = append(appendCompact(out, uint64(len(b))), b...) }
	flag := func(on bool) {
		if on {
			out = append(out, 1)
		} else {
			out = append(out, 0)
		}
	}
	moment := func(at *uint64) {
		flag(at != nil)
		if at != nil {
			out = binary.LittleEndian.AppendUint64(out, *at)
		}
	}
	bytes([]byte(csrWord))
	bytes(spki)
	flag(false) // org_name: the agent has none
	bytes([]byte(r.subject))
	out = appendCompact(out, uint64(len(r.altNames)))
	for _, name := range r.altNames {
		bytes([]byte(name))
	}
	flag(r.serverAuth)
	flag(r.clientAuth)
	flag(r.raTLS)
	flag(r.appInfo)
	moment(r.notBefore)
	moment(r.notAfter)
	return append(out, evidence...)
}

// appendCompact appends a SCALE compact integer below 2^30, as all lengths here are.
func appendCompact(b []byte, n uint64) []byte {
	switch {
	case n < 1<<6:
		return append(b, byte(n<<2))
	case n < 1<<14:
		return binary.LittleEndian.AppendUint16(b, uint16(n<<2|1))
	default:
		return binary.LittleEndian.AppendUint32(b, uint32(n<<2|2))
	}
}
