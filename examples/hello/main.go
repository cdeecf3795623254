// SPDX-License-Identifier: Apache-2.0

// Command hello is the smallest app: it answers HTTP with what it knows of where
// it runs. It is built as one static binary and put into an image of one layer.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	greeting := os.Getenv("GREETING")
	if greeting == "" {
		greeting = "hello"
	}
	host, _ := os.Hostname()
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s from container %s\n", greeting, host)
	})
	server := &http.Server{Addr: ":80", ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(server.ListenAndServe())
}
