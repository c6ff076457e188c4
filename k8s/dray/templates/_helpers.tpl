{{- define "dray.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "dray.fullname" -}}
{{- $name := include "dray.name" . -}}
{{- $default := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- .Values.fullnameOverride | default $default | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "dray.labels" -}}
app.kubernetes.io/name: {{ include "dray.name" $ }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "dray.selector" -}}
app.kubernetes.io/name: {{ include "dray.name" $ }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: proxy
{{- end -}}

{{- define "dray.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "dray.exposure" -}}
{{- include "dray.renamed" . -}}
{{- $by := .Values.exposure.type | default (ternary "hostNetwork" "nodePort" (eq .Values.mode "daemonset")) -}}
{{- if and (eq .Values.mode "daemonset") (not (has $by (list "hostNetwork" "hostPort"))) -}}
{{- fail (printf "exposure.type: %s is for mode: deployment or statefulset; a daemonset has hostNetwork or hostPort" $by) -}}
{{- end -}}
{{- if and (ne .Values.mode "daemonset") (not (has $by (list "nodePort" "clusterIP"))) -}}
{{- fail (printf "exposure.type: %s is for mode: daemonset; a %s has nodePort or clusterIP" $by .Values.mode) -}}
{{- end -}}
{{- if and (eq $by "clusterIP") (not .Values.exposure.clusterIP) (not .Values.exposure.mirror) -}}
{{- fail "exposure.clusterIP: a free address of the cluster's Service range is needed, since nodes cannot resolve names" -}}
{{- end -}}
{{- if and .Values.exposure.ipv6 (has $by (list "hostPort" "nodePort")) (not .Values.exposure.mirror) -}}
{{- fail (printf "exposure.ipv6: with %s nothing leads from 127.0.0.1 to an IPv6 address: use hostNetwork or clusterIP, or set exposure.mirror" $by) -}}
{{- end -}}
{{- $by -}}
{{- end -}}

{{- define "dray.mirror" -}}
{{- $by := include "dray.exposure" . -}}
{{- if .Values.exposure.mirror -}}{{ .Values.exposure.mirror }}
{{- else if eq $by "nodePort" -}}http://127.0.0.1:{{ .Values.exposure.nodePort }}
{{- else if eq $by "clusterIP" -}}http://{{ include "dray.bracketed" .Values.exposure.clusterIP }}:{{ .Values.exposure.port }}
{{- else -}}http://127.0.0.1:{{ .Values.exposure.port }}
{{- end -}}
{{- end -}}

{{- define "dray.bracketed" -}}
{{ ternary (printf "[%s]" .) . (contains ":" .) }}
{{- end -}}

{{/* Refuses values of which pods would be made that never start. */}}
{{- define "dray.validate" -}}
{{- if regexMatch "(?m)^[ \\t]*\\[+[ \\t]*(cache|peers|containerd)[ \\t]*[].]" .Values.extraConfig -}}
{{- fail "extraConfig: [cache], [peers] and [containerd] are written by the chart: use cache, peers, zones and containerd" -}}
{{- end -}}
{{- $first := regexFind "(?m)^[ \\t]*[^# \\t\\r\\n].*$" .Values.extraConfig | trim -}}
{{- if and $first (not (hasPrefix "[" $first)) -}}
{{- fail (printf "extraConfig: \"%s\" is outside of a table: begin with one, such as [[registry]]; listen, admin and the like are values of the chart" $first) -}}
{{- end -}}
{{- $registry := ternary .Values.exposure.port 5050 (eq (include "dray.exposure" .) "hostNetwork") -}}
{{- $ports := list (int .Values.peers.port) (int .Values.metrics.port) (int $registry) -}}
{{- if ne (len (uniq $ports)) 3 -}}
{{- fail "exposure.port, peers.port, metrics.port: each needs a port of its own" -}}
{{- end -}}
{{- range .Values.zones.names -}}
{{- if gt (len (printf "%s-%s" (include "dray.peersService" $) .)) 63 -}}
{{- fail (printf "zones.names: with \"%s\" the name of a Service is longer than 63 characters: take a shorter release name" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The zones that have a workload of their own; one without a name if zones.by is not "nodes". */}}
{{- define "dray.zoneList" -}}
{{- if ne .Values.zones.by "none" -}}
{{- if not .Values.zones.names -}}{{- fail "zones.names: with zones.by each zone must be named" -}}{{- end -}}
{{- end -}}
{{- if eq .Values.zones.by "nodes" -}}{{ toJson .Values.zones.names }}{{- else -}}[""]{{- end -}}
{{- end -}}

{{- define "dray.peersService" -}}
{{ include "dray.fullname" . }}-peers
{{- end -}}

{{/* The Secret with the peers' key; empty: peers do not authenticate each other. */}}
{{- define "dray.peersKeySecret" -}}
{{- $generated := ternary (printf "%s-peers-key" (include "dray.fullname" .)) "" .Values.peers.generateKey -}}
{{- .Values.peers.keySecret | default $generated -}}
{{- end -}}

{{/* The pods of a StatefulSet are known by their names, which SRV records of the port list. */}}
{{- define "dray.srv" -}}
{{- if eq .Values.mode "statefulset" }}_peers._tcp.{{ end -}}
{{- end -}}

{{- define "dray.workload" -}}
{{- get (dict "daemonset" "ds" "deployment" "deploy" "statefulset" "sts") .Values.mode -}}
{{- end -}}

{{- define "dray.domain" -}}
{{ .Release.Namespace }}.svc.{{ .Values.peers.clusterDomain }}
{{- end -}}

{{- define "dray.admin" -}}
{{- $all := ternary "[::]" "0.0.0.0" .Values.exposure.ipv6 -}}
{{- $loopback := and (eq (include "dray.exposure" .) "hostNetwork") (not .Values.metrics.enabled) -}}
{{ ternary "127.0.0.1" $all $loopback }}:{{ .Values.metrics.port }}
{{- end -}}

{{- define "dray.config" -}}
{{- include "dray.ownConfig" . }}

[log]
filter = {{ .Values.log.filter | quote }}
{{- with .Values.extraConfig }}

{{ . | trim }}
{{- end }}
{{- end -}}

{{/* The tables that the chart writes: a change of these needs a restart. dray reloads extraConfig itself. */}}
{{- define "dray.ownConfig" -}}
{{- include "dray.validate" . -}}
{{- $by := include "dray.exposure" . -}}
{{- $loopback := eq $by "hostNetwork" -}}
{{- $all := ternary "[::]" "0.0.0.0" .Values.exposure.ipv6 -}}
listen = "{{ ternary "127.0.0.1" $all $loopback }}:{{ ternary .Values.exposure.port 5050 $loopback }}"
admin = {{ include "dray.admin" . | quote }}
{{- if .Values.metrics.tokenSecret }}
admin_token_file = "/etc/dray/admin/token"
{{- end }}

[cache]
dir = "/var/cache/dray"
disk = {{ .Values.cache.disk | quote }}
min_free = {{ .Values.cache.minFree | default (ternary "5%" "16%" (not (empty .Values.cache.volume))) | quote }}
memory = {{ .Values.cache.memory | quote }}

[peers]
listen = "{{ $all }}:{{ .Values.peers.port }}"
{{- if eq .Values.zones.by "none" }}
service = "{{ include "dray.srv" . }}{{ include "dray.peersService" . }}.{{ include "dray.domain" . }}"
{{- else }}
{{- $services := list }}
{{- range .Values.zones.names }}
{{- $services = append $services (printf "%s = \"%s%s-%s.%s\"" (quote .) (include "dray.srv" $) (include "dray.peersService" $) . (include "dray.domain" $)) }}
{{- end }}
service = { {{ join ", " $services }} }
zones = {{ .Values.zones.policy | quote }}
{{- end }}
{{- if include "dray.peersKeySecret" . }}
key_file = "/etc/dray/peers/peers.key"
{{- end }}
{{- if and .Values.containerd.enabled (eq .Values.mode "daemonset") }}

[containerd]
hosts_dir = {{ .Values.containerd.hostsDir | quote }}
mirror = {{ include "dray.mirror" . | quote }}
{{- with .Values.containerd.configFile }}
config_file = {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "dray.security" -}}
runAsUser: 65532
runAsGroup: 65532
runAsNonRoot: true
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* For containers that write files of a node: root, with the capabilities for that only. */}}
{{- define "dray.security.files" -}}
runAsUser: 0
runAsGroup: 0
runAsNonRoot: false
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
  add: ["CHOWN", "DAC_OVERRIDE", "FOWNER"]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* dray runs on Linux only. */}}
{{- define "dray.nodeSelector" -}}
nodeSelector:
  {{- merge (dict) .Values.nodeSelector (dict "kubernetes.io/os" "linux") | toYaml | nindent 2 }}
{{- end -}}

{{/* The nodes whose files are changed. */}}
{{- define "dray.mirroredNodes" -}}
nodeSelector:
  {{- $nodes := ternary .Values.nodeSelector .Values.containerd.nodeSelector (eq .Values.mode "daemonset") }}
  {{- merge (dict) $nodes (dict "kubernetes.io/os" "linux") | toYaml | nindent 2 }}
{{- end -}}

{{- define "dray.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "dray.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "dray.fullname" .) "" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* Values of earlier drafts of this chart, so that an upgrade says what to write instead. */}}
{{- define "dray.renamed" -}}
{{- $renamed := dict "reach" "exposure (reach.by is exposure.type)" "replicas" "replicaCount" "config" "extraConfig" "env" "extraEnv" "serviceAccountName" "serviceAccount.name" "seLinuxOptions" "podSecurityContext.seLinuxOptions" -}}
{{- range $old, $new := $renamed -}}
{{- if hasKey $.Values $old -}}{{- fail (printf "%s: this value is now %s" $old $new) -}}{{- end -}}
{{- end -}}
{{- range $old, $new := dict "serviceMonitor" "serviceMonitor" "prometheusRule" "prometheusRule" "dashboard" "grafanaDashboard" -}}
{{- if hasKey $.Values.metrics $old -}}{{- fail (printf "metrics.%s: this value is now %s" $old $new) -}}{{- end -}}
{{- end -}}
{{- if hasKey .Values.image "pullSecrets" -}}{{- fail "image.pullSecrets: this value is now imagePullSecrets, a list of {name}" -}}{{- end -}}
{{- if hasKey .Values.cache "keepFree" -}}{{- fail "cache.keepFree: this value is now cache.minFree" -}}{{- end -}}
{{- end -}}
