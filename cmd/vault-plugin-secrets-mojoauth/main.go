// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Command vault-plugin-secrets-mojoauth is the plugin that Vault runs. Started by hand,
// it only prints its version, with -version.
package main

import (
	"fmt"
	"io"
	"log"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	mojoauth "github.com/mojoauth/vault-plugin-secrets-mojoauth"
)

func main() {
	if len(os.Args) == 2 && (os.Args[1] == "-version" || os.Args[1] == "--version") {
		fmt.Println(mojoauth.VersionString())
		return
	}

	meta := &api.PluginAPIClientMeta{}
	if err := meta.FlagSet().Parse(os.Args[1:]); err != nil {
		fatal(err)
	}
	silenceStandardLogger()
	defer runtime.KeepAlive(tuneGC())
	go endWithVault(os.Getppid())

	// Multiplexed: the mounts of one plugin version share a process.
	err := plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: mojoauth.Factory,
		// Vault before 1.11 passes TLS on its own; newer versions ignore this.
		TLSProviderFunc: api.VaultPluginTLSProvider(meta.GetTLSConfig()),
	})
	if err != nil {
		fatal(err)
	}
}

// silenceStandardLogger keeps the output of Go's net/http out of Vault's log, which
// receives everything that a plugin writes to stderr: bytes that a token endpoint sends
// unasked, which may contain the client secret, and with GODEBUG=http2debug=2 whole
// requests. Nothing of the plugin is lost: the plugin and go-plugin write to Vault
// through hclog, and what ends the process (a panic, a fatal error) does not pass through
// this logger.
func silenceStandardLogger() { log.SetOutput(io.Discard) }

// tuneGC makes the garbage collector run rarely while the plugin holds little, when it
// only collects what gRPC leaves of each request, and often enough not to double the
// memory of thousands of tokens. The operator's own GOGC takes precedence. It returns
// memory that must be kept alive: it counts as held but is never touched, so it takes
// none of the machine's unless Vault locks memory.
func tuneGC() []byte {
	if os.Getenv("GOGC") != "" {
		return nil
	}
	debug.SetGCPercent(50)
	return make([]byte, 16<<20)
}

// endWithVault ends the process after the process that started it died without notice, as
// after kill -9. Otherwise the plugin would keep secrets in memory and renew tokens for
// no one. Where a process keeps its parent's ID (Windows), nothing happens.
func endWithVault(vault int) {
	for range time.Tick(time.Second) {
		if os.Getppid() != vault {
			os.Exit(1)
		}
	}
}

func fatal(err error) {
	hclog.New(&hclog.LoggerOptions{}).Error("plugin shutting down", "error", err)
	os.Exit(1)
}
