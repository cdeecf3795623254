// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/keys/custody"
	"github.com/dstack-go/dstack/keys/custody/backup"
	"github.com/dstack-go/dstack/kms/onboard"
	"github.com/dstack-go/dstack/releaselog"
)

// The commands of the offline backup (package keys/custody/backup). They work on a data
// directory whose KMS is stopped; secrets are in files, never in arguments.

type backupCmd struct {
	Data      string   `required:"" type:"path" placeholder:"DIR" help:"Data directory of the KMS, which is stopped."`
	Operator  []string `required:"" type:"path" sep:"none" placeholder:"FILE" help:"An operator's public key, as operator-key writes it beside the private one. Repeat."`
	Threshold int      `required:"" placeholder:"M" help:"How many operators restore the root keys."`
	Output    string   `short:"o" required:"" type:"path" placeholder:"FILE" help:"New file for the backup."`
}

func (c *backupCmd) Run() error {
	syscall.Umask(0o077)
	var operators []backup.Operator
	for _, path := range c.Operator {
		text, err := readFile(path)
		if err != nil {
			return err
		}
		o, err := backup.ParseOperator(string(bytes.TrimSpace(text)))
		if err != nil {
			return err
		}
		operators = append(operators, o)
	}
	roots, err := custody.Open(onboard.RootFile(c.Data))
	if err != nil {
		return err
	}
	defer roots.Wipe()
	// The log is also the lock: a KMS that serves has it open.
	log, err := releaselog.Open(onboard.LogDir(c.Data), roots.Identity().CA)
	if err != nil {
		return err
	}
	defer log.Close()
	text, err := backup.Seal(roots, operators, c.Threshold)
	if err != nil {
		return err
	}
	b, err := backup.Parse(text)
	if err != nil {
		return err
	}
	// Whoever the roots go to is written down before they go (threats.md G10).
	note := fmt.Sprintf("backup %x of the root keys, to %d operators of whom %d restore it:", b.ID, len(operators), c.Threshold)
	for _, o := range operators {
		note += " " + o.Name
	}
	if _, err := log.Append(context.Background(), releaselog.Entry{Time: time.Now(), Kind: releaselog.Member, Note: note}); err != nil {
		return err
	}
	if err := createFile(c.Output, text); err != nil {
		return err
	}
	fmt.Printf("backup %x of the root %x\nany %d of %d operators restore it; keep a copy where this machine's loss does not reach\n",
		b.ID, b.Identity.CA, c.Threshold, len(operators))
	return nil
}

type operatorKeyCmd struct {
	Name   string `required:"" help:"The operator's name in backups."`
	Output string `short:"o" required:"" type:"path" placeholder:"FILE" help:"New file for the private key; the public one goes to FILE.pub."`
}

func (c *operatorKeyCmd) Run() error {
	operator := backup.Operator{Name: c.Name, Public: make([]byte, 32)}
	if _, err := backup.ParseOperator(operator.String()); err != nil {
		return err // before there is a key that nobody can name
	}
	key, err := backup.CreateKey(c.Output)
	if err != nil {
		return err
	}
	operator.Public = key.Public()
	if err := createFile(c.Output+".pub", []byte(operator.String()+"\n")); err != nil {
		return err
	}
	fmt.Println(operator)
	return nil
}

type shareCmd struct {
	Backup string `required:"" type:"path" placeholder:"FILE" help:"The backup."`
	Key    string `required:"" type:"path" placeholder:"FILE" help:"The operator's private key."`
	Output string `short:"o" type:"path" placeholder:"FILE" help:"New file for the share, mode 0600, in place of standard output."`
}

func (c *shareCmd) Run() error {
	b, err := readBackup(c.Backup)
	if err != nil {
		return err
	}
	key, err := backup.OpenKey(c.Key)
	if err != nil {
		return err
	}
	share, err := b.OpenShare(key)
	if err != nil {
		return err
	}
	defer share.Wipe()
	text := append(bytes.TrimSpace(share.Text()), '\n')
	defer clear(text)
	fmt.Fprintf(os.Stderr, "This share is a secret: give it to nobody but the one who restores backup %x of the root %x.\n", b.ID, b.Identity.CA)
	if c.Output != "" {
		return createFile(c.Output, text)
	}
	_, err = os.Stdout.Write(text)
	return err
}

type restoreCmd struct {
	Data   string   `required:"" type:"path" placeholder:"DIR" help:"Data directory of the new KMS, which has no root keys."`
	Backup string   `required:"" type:"path" placeholder:"FILE" help:"The backup."`
	Share  []string `required:"" type:"path" sep:"none" placeholder:"FILE" help:"File with the line of one share, mode 0600. Repeat."`
	RootCA string   `required:"" name:"root-ca" placeholder:"HEX" help:"The root that the KMS's apps pin (key_provider_id), DER SubjectPublicKeyInfo in hexadecimal: a backup says what whoever made it wanted."`
}

func (c *restoreCmd) Run() error {
	syscall.Umask(0o077)
	b, err := readBackup(c.Backup)
	if err != nil {
		return err
	}
	// The other root is the word of whoever has this one: nobody else can have sealed it.
	want := custody.Identity{K256: b.Identity.K256}
	if want.CA, err = hex.DecodeString(c.RootCA); err != nil {
		return fault.New("root_mismatch", "--root-ca is not hexadecimal")
	}
	var shares []backup.Share
	defer func() {
		for _, s := range shares {
			s.Wipe()
		}
	}()
	for _, path := range c.Share {
		info, err := os.Stat(path)
		if err != nil {
			return fault.Wrap(err, "file_missing", "read a share")
		}
		if info.Mode().Perm()&0o077 != 0 {
			return fault.New("share_mode", "others may read the share %s (mode %04o)", path, info.Mode().Perm()).
				WithFix("chmod 600 %s; whoever read it needs fewer operators than the quorum", path)
		}
		text, err := readFile(path)
		if err != nil {
			return err
		}
		s, err := backup.ParseShare(text)
		clear(text)
		if err != nil {
			return err
		}
		shares = append(shares, s)
	}
	roots, err := b.Restore(shares, want)
	if err != nil {
		return err
	}
	if err := onboard.Restore(context.Background(), c.Data, hex.EncodeToString(b.ID[:]), roots); err != nil {
		return err
	}
	fmt.Printf("the root %x is in %s; its release log begins anew\n", want.CA, c.Data)
	return nil
}

func readBackup(path string) (*backup.Backup, error) {
	text, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return backup.Parse(text)
}

// readFile reads a file of at most one byte more than a backup may have.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fault.Wrap(err, "file_missing", "read %s", path)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, backup.MaxSize+1))
}

// createFile writes a new file durably; what is there stays.
func createFile(path string, text []byte) error {
	fail := func(err error) error { return fault.Wrap(err, "file_write", "write %s", path) }
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fail(err)
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fail(err)
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fail(err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fail(err)
	}
	return nil
}
