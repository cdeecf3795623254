// SPDX-License-Identifier: Apache-2.0

package verifyd

import (
	"bytes"
	"context"
	"encoding/json"
	"io"

	"github.com/dstack-go/dstack/internal/durable"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/verifier"
)

// Endings of the files that one-shot verification writes beside its input.
const (
	ReplySuffix       = ".verification.json"
	CertificateSuffix = ".ratls-verification.json"
)

// VerifyFile judges a file that holds a /verify request. It prints the reply as one
// line to w, writes it to path + ReplySuffix for people, and returns it. What is no
// request is a reply that says so; an error is of writing.
func (s *Service) VerifyFile(ctx context.Context, path string, w io.Writer) (*Response, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.requestTimeout())
	defer cancel()
	var out *Response
	data, err := readBounded(path, MaxBody)
	var req *Request
	if err == nil {
		req, _, err = ParseRequest(data)
	}
	if err == nil {
		out = s.Verify(ctx, req)
	} else {
		out = &Response{Details: Details{AdvisoryIDs: []string{}}, Verdict: verifier.Refuse(err, "", s.now())}
		out.refuse(prefixInternal + err.Error())
	}
	return out, write(out, path+ReplySuffix, w)
}

// VerifyCertificateFile does the same for a file that holds an RA-TLS certificate.
// Where the certificate does not hold, nothing is written and the error says why.
func (s *Service) VerifyCertificateFile(ctx context.Context, path string, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, s.config.requestTimeout())
	defer cancel()
	data, err := readBounded(path, maxCertificate)
	if err != nil {
		return err
	}
	out, err := s.VerifyCertificate(ctx, data)
	if err != nil {
		return err
	}
	return write(out, path+CertificateSuffix, w)
}

func write(v any, path string, w io.Writer) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, line, "", "  "); err != nil {
		return err
	}
	if _, err := w.Write(append(line, '\n')); err != nil {
		return fault.Wrap(err, "save", "print the result")
	}
	if err := durable.WriteFile(path, append(pretty.Bytes(), '\n'), 0o644); err != nil {
		return fault.Wrap(err, "save", "save the result")
	}
	return nil
}
