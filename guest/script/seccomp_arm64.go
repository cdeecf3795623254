// SPDX-License-Identifier: Apache-2.0

package script

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

var archDeniedCalls = []uintptr{unix.SYS_KEXEC_FILE_LOAD}
