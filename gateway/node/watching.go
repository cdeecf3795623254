// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"net/http"
	"strconv"

	"github.com/dstack-go/dstack/gateway"
	"github.com/dstack-go/dstack/gateway/admin"
	"github.com/dstack-go/dstack/gateway/cluster"
	"github.com/dstack-go/dstack/gateway/ctwatch"
	"github.com/dstack-go/dstack/gateway/metrics"
	"github.com/dstack-go/dstack/gateway/page"
	"github.com/dstack-go/dstack/gateway/tunnel"
)

// watching is what administrators see of a run beside their calls.
type watching struct {
	metrics *metrics.Metrics
	pages   http.Handler // the page, metrics, health and profiles
	logs    admin.Watch  // nil: no certificate log is watched
}

// watching makes it of the parts of a run; w may be nil.
//
// A gateway is ready when its tunnel answers and guests may register: not only with a
// quorum, and not only with certificates, for without both it serves the apps that it has.
func (n *Node) watching(agreed *cluster.Cluster, apps *gate, tn *tunnel.Tunnel, service *gateway.Service, w *ctwatch.Watcher) watching {
	l := n.live
	cfg := metrics.Config{
		Version: n.Version, Mode: string(tn.Mode()), Public: apps.edge, Routes: l.table, Network: agreed.Node().Address.Masked(), Service: service.Stats(), Tunnel: tn,
		Certificates: l.certificates, Draining: apps.Draining,
		Cluster: func(ctx context.Context) (metrics.Cluster, error) { return clusterNow(ctx, agreed) },
		Ready: []metrics.Check{
			{Name: "tunnel", Err: func() error { _, err := tn.Peers(); return err }},
			{Name: "registration", Err: n.closed(agreed)},
		},
	}
	if m := l.manager; m != nil {
		cfg.Outcomes = func() (out []metrics.Outcome) {
			for _, o := range m.Outcomes() {
				out = append(out, metrics.Outcome{Authority: o.CA, Result: "issued", Count: o.Issued}, metrics.Outcome{Authority: o.CA, Result: "failed", Count: o.Failed})
			}
			return out
		}
	}
	var out watching
	if w != nil {
		out.logs = w
		cfg.Logs = func() metrics.Logs {
			s := w.Status()
			l := metrics.Logs{Alarms: len(s.Alarms) + s.Dropped, Checked: s.Checked}
			for _, x := range s.Logs {
				if x.Err != nil {
					l.Failing++
				}
			}
			return l
		}
	}
	out.metrics = metrics.New(cfg)
	mux := http.NewServeMux()
	out.metrics.Register(mux)
	page.Register(mux)
	out.pages = mux
	return out
}

func clusterNow(ctx context.Context, c *cluster.Cluster) (metrics.Cluster, error) {
	members, quorum, err := c.Members(ctx)
	if err != nil {
		return metrics.Cluster{}, err
	}
	out := metrics.Cluster{Quorum: quorum}
	for _, m := range members {
		if m.Self {
			out.Leader = m.Leader
			continue
		}
		out.Others = append(out.Others, metrics.Member{ID: strconv.FormatUint(uint64(m.ID), 10), Heard: m.Heard})
	}
	return out, nil
}

// certificates are those of the base domains.
func (l *live) certificates() (out []metrics.Certificate) {
	if l.manager != nil {
		for _, s := range l.manager.Status() {
			out = append(out, metrics.Certificate{Name: s.Name, NotAfter: s.NotAfter, Failing: s.Err != ""})
		}
		return out
	}
	s := l.n.privateStatus()
	for _, d := range l.Domains() {
		for _, name := range names(d.Name) {
			out = append(out, metrics.Certificate{Name: name, NotAfter: s.NotAfter, Failing: s.Err != ""})
		}
	}
	return out
}

// privateStatus is that of the private CA's certificate, one for all base domains.
func (n *Node) privateStatus() admin.CertificateStatus {
	cert, err := n.ca.GetCertificate(nil)
	if err != nil {
		return admin.CertificateStatus{Err: err.Error()}
	}
	return admin.CertificateStatus{NotAfter: cert.Leaf.NotAfter, NotBefore: cert.Leaf.NotBefore, Served: true}
}
