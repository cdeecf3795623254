// SPDX-License-Identifier: Apache-2.0

package clock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Extension fields of RFC 8915 §5.3 and §5.6.
const (
	fieldUniqueID      = 0x0104
	fieldAuthenticator = 0x0404

	headerSize = 48
	maxReply   = 4096
	tagSize    = 16 // of both AEADs in use
)

// layout is what matters of an NTS packet.
type layout struct {
	uniqueID  []byte
	nonceSize int
}

// parsePacket reads the fields of an NTS packet (RFC 7822 §3, RFC 8915 §5.7): one
// unique identifier, then the authenticator, which covers everything before it, as the
// last field. RFC 8915 lets unauthenticated fields follow; no server has a use for
// them, and none are taken.
func parsePacket(b []byte) (layout, error) {
	var l layout
	if len(b) < headerSize || len(b) > maxReply {
		return l, fmt.Errorf("the packet has %d bytes", len(b))
	}
	for rest := b[headerSize:]; len(rest) > 0; {
		if len(rest) < 4 {
			return l, errors.New("an extension field is cut off")
		}
		kind, size := binary.BigEndian.Uint16(rest), int(binary.BigEndian.Uint16(rest[2:]))
		if size < 16 || size%4 != 0 || size > len(rest) {
			return l, fmt.Errorf("an extension field has %d bytes, %d are left", size, len(rest))
		}
		body := rest[4:size]
		rest = rest[size:]
		switch kind {
		case fieldUniqueID:
			if l.uniqueID != nil {
				return l, errors.New("there are two unique identifiers")
			}
			l.uniqueID = body
		case fieldAuthenticator:
			nonce, sealed := int(binary.BigEndian.Uint16(body)), int(binary.BigEndian.Uint16(body[2:]))
			switch {
			case l.uniqueID == nil:
				return l, errors.New("there is no unique identifier before the authenticator")
			case len(rest) > 0:
				return l, errors.New("something follows the authenticator")
			case nonce == 0 || sealed < tagSize || 4+padded(nonce)+padded(sealed) > len(body):
				return l, fmt.Errorf("the authenticator has a nonce of %d and a ciphertext of %d bytes in %d", nonce, sealed, len(body))
			}
			l.nonceSize = nonce
			return l, nil
		}
	}
	return l, errors.New("there is no authenticator")
}

func padded(n int) int { return (n + 3) &^ 3 }

// checkReply accepts a server's answer to a question of ours if it repeats what only
// who saw the question knows and has an authenticator that the library will check. The
// nonce must be as long as the question's: the AEAD panics on another.
func checkReply(question, reply []byte) error {
	q, err := parsePacket(question)
	if err != nil {
		return fmt.Errorf("question: %w", err)
	}
	r, err := parsePacket(reply)
	if err != nil {
		return err
	}
	const mode, server = 7, 4
	switch {
	case reply[0]&mode != server:
		return errors.New("the packet is no answer")
	case !bytes.Equal(reply[24:32], question[40:48]):
		return errors.New("the answer is to another question: origin timestamp")
	case !bytes.Equal(r.uniqueID, q.uniqueID):
		return errors.New("the answer is to another question: unique identifier")
	case r.nonceSize != q.nonceSize:
		return fmt.Errorf("the nonce has %d bytes, the AEAD takes %d", r.nonceSize, q.nonceSize)
	}
	return nil
}
